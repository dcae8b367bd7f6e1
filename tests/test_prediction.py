"""The dictionary of paths: what it foretells, what it rests on, and that it says how much."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from zipmoe._errors import TraceError
from zipmoe._synthetic_routing import Routing, synthetic_trace
from zipmoe.cli import app
from zipmoe.prediction import KEYS, PathDictionary, judge
from zipmoe.routing import Trace


def trace_of(tokens, experts):
    """One request, its first token a prompt."""
    tokens = np.array(tokens)
    runs = len(tokens)
    numbers = np.arange(runs)
    return Trace(experts, tokens, numbers, np.zeros(runs, int), np.ones(runs, int))


PATHS = [[[0], [1], [2]], [[0], [1], [2]], [[0], [1], [3]], [[3], [1], [0]], [[2], [2], [3]]]


def test_the_path_decides_then_the_nearer_layer_then_popularity():
    dictionary = PathDictionary(trace_of(PATHS, experts=4))
    assert dictionary.entries == 3
    assert dictionary.likely(2, np.array([[0], [1], [9]])) == ([2], KEYS[0])
    assert dictionary.likely(2, np.array([[3], [1], [9]])) == ([0], KEYS[0])
    assert dictionary.likely(2, np.array([[1], [1], [9]])) == ([2], KEYS[1])
    assert dictionary.likely(2, np.array([[0], [3], [9]])) == ([2], KEYS[2])
    # Of two that the nearer layer leads to equally often, the more popular one.
    assert dictionary.popular(2).tolist() == [2]


def test_a_key_is_a_set_the_order_of_choices_does_not_count():
    dictionary = PathDictionary(trace_of([[[0, 1], [2, 3], [1, 2]]] * 2, experts=4))
    foretold, key = dictionary.likely(2, np.array([[1, 0], [3, 2], [0, 0]]))
    assert sorted(foretold) == [1, 2]
    assert key == KEYS[0]


def test_the_layer_itself_is_not_looked_at():
    dictionary = PathDictionary(trace_of(PATHS, experts=4))
    one, other = (dictionary.likely(2, np.array([[0], [1], [x]])) for x in (2, 3))
    assert one == other


def test_recall_and_coverage_are_counted_over_decoded_tokens():
    known = trace_of(PATHS, experts=4)
    unknown = trace_of([[[0], [1], [0]], [[0], [1], [2]], [[0], [1], [3]], [[0], [3], [2]]], 4)
    found = judge(known, unknown)
    assert found.tokens == 3
    assert found.recall == pytest.approx(2 / 3)
    assert found.coverage == pytest.approx({KEYS[0]: 2 / 3, KEYS[1]: 0, KEYS[2]: 1 / 3})
    assert found.recall_by_key == pytest.approx({KEYS[0]: 1 / 2, KEYS[2]: 1})
    assert found.popular == pytest.approx(2 / 3)
    assert found.repeated == 0


def test_many_of_many_are_hardly_ever_in_the_dictionary():
    few, many = (
        judge(*synthetic_trace(sizes, seed=2).split(0.5, seed=0))
        for sizes in (Routing(8, 4, 1, 6, 16, 64), Routing(60, 4, 4, 6, 16, 64))
    )
    assert few.coverage[KEYS[0]] > 0.5
    assert many.coverage[KEYS[0]] < 0.01


def test_two_layers_are_too_few():
    with pytest.raises(TraceError, match="third"):
        PathDictionary(trace_of([[[0], [1]]], experts=2))


def test_bench_policy_says_what_a_dictionary_would_foretell():
    words = ["bench", "policy", "--synthetic", "4x8x1", "--slots", "9"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0
    assert "from two layers" in said.stdout
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["prediction"]
    assert found["coverage"]["two layers"] > 0.5
    two = CliRunner().invoke(app, ["bench", "policy", "--synthetic", "2x8x1", "--json"])
    assert json.loads(two.stdout)["prediction"] is None
