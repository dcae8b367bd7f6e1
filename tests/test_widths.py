"""The search of widths: what it returns was measured, is allowed, and is the most that is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zipmoe._losses import KnownFacts
from zipmoe.lowered import LOSSLESS
from zipmoe.widths import assign, bracket, fewest, uniform

PLACES = [(layer, expert) for layer in range(3) for expert in range(5)]
COSTS = {"int2": 1.0, "int4": 0.1, "int8": 0.001, LOSSLESS: 0.0}


def loss_of(weights):
    """Every expert costs its weight times that of its width; calls are counted."""

    def loss(widths):
        loss.calls.append(dict(widths))
        return sum(weights[place] * COSTS[width] for place, width in widths.items())

    loss.calls = []
    return loss


@given(seed=st.integers(0, 10**6), most=st.floats(0, 40))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_as_many_experts_are_lowered_as_the_loss_allows(seed, most):
    rng = np.random.default_rng(seed)
    weights = dict(zip(PLACES, rng.exponential(2.0, len(PLACES)), strict=True))
    loss = loss_of(weights)
    pair = bracket(PLACES, loss, most)
    order = sorted(PLACES, key=weights.get)
    found = fewest(order, pair, loss, most)
    assert loss(found.widths) == found.loss <= most
    assert found.widths == assign(order, pair, found.lowered)
    if found.lowered < len(order):
        assert loss(assign(order, pair, found.lowered + 1)) > most
    else:
        assert set(found.widths.values()) == {"int2"}


def test_the_bracket_is_two_neighbours_of_which_only_the_higher_one_is_allowed():
    loss = loss_of(dict.fromkeys(PLACES, 1.0))
    assert bracket(PLACES, loss, 0.001) == ("int8", LOSSLESS)
    assert bracket(PLACES, loss, 0.1) == ("int4", "int8")
    assert bracket(PLACES, loss, 2.0) == ("int2", "int4")
    assert bracket(PLACES, loss, 20.0) == ("int2", "int2")


def test_few_choices_are_measured():
    places = [(layer, expert) for layer in range(30) for expert in range(16)]
    loss = loss_of(dict.fromkeys(places, 1.0))
    fewest(places, ("int4", "int8"), loss, 20.0)
    assert len(loss.calls) <= 1 + np.ceil(np.log2(len(places)))


def test_uniform_widths_name_every_expert():
    assert uniform(PLACES, "int4") == dict.fromkeys(PLACES, "int4")


class Counted:
    def __init__(self):
        self.found = 0

    def __call__(self):
        self.found += 1
        return {"nll": 1.5 + self.found}


def test_what_was_measured_is_known_to_the_next_run(tmp_path):
    path, find = tmp_path / "facts", Counted()
    assert KnownFacts(path, "a").get(["quality", ["int4"]], find) == {"nll": 2.5}
    assert KnownFacts(path, "a").get(["quality", ["int4"]], find) == {"nll": 2.5}
    assert find.found == 1
    assert KnownFacts(path, "b").get(["quality", ["int4"]], find) == {"nll": 3.5}
    KnownFacts(path, "a").forget()
    assert not path.exists()


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_a_torn_or_wrong_line_is_measured_again(tmp_path, damage):
    path, find = tmp_path / "facts", Counted()
    known = KnownFacts(path, "a")
    known.get("one", find)
    known.get("two", find)
    data = path.read_bytes()
    path.write_bytes(data[:-3] if damage == "torn" else data.replace(b"3.5", b"9.5"))
    again = KnownFacts(path, "a")
    assert again.get("one", find) == {"nll": 2.5}
    assert again.get("two", find) == {"nll": 4.5}
    assert KnownFacts(path, "a").get("two", find) == {"nll": 4.5}
