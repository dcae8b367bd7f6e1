"""Replacement policies: what goes is what each rule says, seen from a model written from the rule.

The models look through all experts every time; the core keeps heaps.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_shards import make_shards

from zipmoe import _core

TOLD = ("static", "belady")  # policies that need to be told something
ONLINE = tuple(name for name in _core.policies() if name not in TOLD)


def run(steps, *, layers, experts, policy, slots, begins=None, popularity=()):
    """Replay steps [tokens, layers, k]; total misses of each step and layer."""
    return _core.replay(
        np.concatenate(steps).astype(np.uint32),
        np.array([len(step) for step in steps], np.uint32),
        np.array(begins if begins is not None else [0.0] * len(steps)),
        num_experts=experts,
        policy=policy,
        slots=slots,
        popularity=np.array(popularity, float),
    )


class Model:
    """A cache that says by `worth` what an expert is worth; visits one after the other."""

    def __init__(self, layers, experts, slots):
        self.layers, self.experts, self.slots = layers, experts, slots
        self.held, self.clock, self.layer = set(), 0, 0
        self.used = dict.fromkeys(itertools.product(range(layers), range(experts)), 0)

    def distance(self, layer):
        return (layer - self.layer - 1) % self.layers + 1

    def run(self, steps, begins):
        misses = []
        for step, begin in zip(steps, begins, strict=True):
            if begin:
                self.begin(begin)
            misses += [self.run_layer(layer, step[:, layer]) for layer in range(self.layers)]
        return np.array(misses).reshape(len(steps), self.layers)

    def run_layer(self, layer, chosen):
        self.layer = layer
        self.seen(layer, len(chosen))
        experts, tokens = np.unique(chosen, return_counts=True)
        wanted = [(layer, int(expert)) for expert in experts]
        absent = [key for key in wanted if key not in self.held]
        for key, count in zip(wanted, tokens, strict=True):
            self.use(key, int(count), len(chosen))
            self.clock += 1
            self.used[key] = self.clock
        for key in absent:  # lists of these tests fit in the slots
            if len(self.held) == self.slots:
                idle = self.held - set(wanted)
                gone = min(idle, key=lambda key: (self.worth(key), self.tie(key)))
                self.held.remove(gone)
            self.held.add(key)
            self.admit(key)
        return len(absent)

    def tie(self, key):
        return self.used[key]

    def begin(self, share): ...
    def seen(self, layer, tokens): ...
    def use(self, key, count, tokens): ...
    def admit(self, key): ...
    def worth(self, key):
        return 0


class Fifo(Model):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.admitted, self.entries = {}, 0

    def admit(self, key):
        self.entries += 1
        self.admitted[key] = self.entries

    def tie(self, key):
        return self.admitted[key]


class Lfu(Model):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.count = dict.fromkeys(self.used, 0)

    def use(self, key, count, tokens):
        self.count[key] += 1

    def worth(self, key):
        return self.count[key]


class EdgeMoe(Lfu):
    def worth(self, key):
        away = (key[0] - self.layer) % self.layers
        return self.count[key] / away if away else math.inf


class ByRequest(Model):
    """Expected part of the tokens: 16 tokens' worth of what came before, 128 of half-life."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.now = {key: [] for key in self.used}  # (tokens of the layer then, tokens that chose)
        self.before = dict.fromkeys(self.used, 0.0)
        self.prior = dict.fromkeys(self.used, 0.0)
        self.tokens = [0.0] * self.layers  # of this request
        self.tokens_before = [0.0] * self.layers
        self.passes = [[] for _ in range(self.layers)]

    def begin(self, share):
        assert share == 1
        for key in self.used:
            self.prior[key] = 16 * self.before[key] / max(1.0, self.tokens_before[key[0]])
            self.now[key] = []
        self.tokens = [0.0] * self.layers
        self.passes = [[] for _ in range(self.layers)]

    def seen(self, layer, tokens):
        self.tokens[layer] += min(tokens, 64)
        self.tokens_before[layer] += min(tokens, 64)
        self.passes[layer].append((self.tokens[layer], min(tokens, 64)))

    def use(self, key, count, tokens):
        counted = count * min(tokens, 64) / tokens
        self.before[key] += counted
        self.now[key].append((self.tokens[key[0]], counted))

    def aged(self, layer, pairs, prior):
        total = self.tokens[layer]
        return prior * 2 ** (-total / 128) + sum(n * 2 ** ((at - total) / 128) for at, n in pairs)

    def worth(self, key):
        layer = key[0]
        of_layer = self.aged(layer, self.passes[layer], 16)
        share = self.aged(layer, self.now[key], self.prior[key]) / of_layer
        return share * math.exp(-self.distance(layer) / self.layers)


MODELS = {"lru": Model, "fifo": Fifo, "lfu": Lfu, "edgemoe": EdgeMoe, "request": ByRequest}


def random_steps(rng, *, layers, experts, k, requests, decode, prompt):
    steps, begins = [], []
    for _ in range(requests):
        liking = rng.normal(0, 1.5, (layers, experts))
        for number in range(decode + 1):
            tokens = prompt if number == 0 else 1
            noise = rng.gumbel(size=(tokens, layers, experts))
            steps.append(np.argsort(-(liking + noise), axis=2)[:, :, :k])
            begins.append(1.0 if number == 0 else 0.0)
    return steps, begins


@pytest.mark.parametrize("policy", MODELS)
@given(seed=st.integers(0, 10**6), slots=st.integers(8, 30), layers=st.integers(1, 4))
@settings(max_examples=25, derandomize=True, deadline=None)
def test_what_goes_is_what_the_rule_says(policy, seed, slots, layers):
    rng = np.random.default_rng(seed)
    sizes = {"layers": layers, "experts": 8}
    steps, begins = random_steps(
        rng, **sizes, k=2, requests=3, decode=20, prompt=int(rng.integers(1, 130))
    )
    found = run(steps, **sizes, policy=policy, slots=slots, begins=begins)
    model = MODELS[policy](layers, 8, slots)
    assert np.array_equal(found["misses"], model.run(steps, begins))
    visits = [[len(np.unique(step[:, layer])) for layer in range(layers)] for step in steps]
    assert np.array_equal(found["misses"] + found["hits"], visits)
    assert found["evictions"] == max(0, int(found["misses"].sum()) - slots)


def least_misses(uses, slots):
    """The optimum by trying every choice, forced admission as in the cache."""
    states = {frozenset(): 0}
    for use in uses:
        after = {}
        for held, misses in states.items():
            if use in held:
                choices = [(held, misses)]
            elif len(held) < slots:
                choices = [(held | {use}, misses + 1)]
            else:
                choices = [(held - {gone} | {use}, misses + 1) for gone in held]
            for state, cost in choices:
                after[state] = min(cost, after.get(state, 10**9))
        states = after
    return min(states.values())


@given(uses=st.lists(st.integers(0, 5), min_size=1, max_size=40), slots=st.integers(1, 4))
@settings(max_examples=150, derandomize=True, deadline=None)
def test_belady_misses_as_little_as_any_choice_could(uses, slots):
    steps = [np.array([[[use]]]) for use in uses]
    sizes = {"layers": 1, "experts": 6}
    found = run(steps, **sizes, policy="belady", slots=slots)
    assert found["misses"].sum() == least_misses(uses, slots)


def phases(uses, slots):
    """Parts of a sequence, each as long as no more experts than slots are in it."""
    parts, seen = [[]], set()
    for use in uses:
        seen.add(use)
        if len(seen) > slots:
            parts.append([])
            seen = {use}
        parts[-1].append(use)
    return parts


@given(uses=st.lists(st.integers(0, 7), min_size=1, max_size=80), slots=st.integers(2, 5))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_marking_keeps_what_a_phase_has_used_until_the_phase_ends(uses, slots):
    steps = [np.array([[[use]]]) for use in uses]
    found = run(steps, layers=1, experts=8, policy="marking", slots=slots)
    hits = iter(found["hits"][:, 0])
    for part in phases(uses, slots):
        seen = set()
        for use in part:
            hit = next(hits)
            assert hit or use not in seen
            seen.add(use)


def test_marking_draws_among_those_without_a_mark():
    # Two of four are marked again, then a fifth comes: each of the other two goes now and then.
    survivors = set()
    for number in range(40):
        warm = [[0, 1, 2, 3][(i * 7 + number) % 4] for i in range(number)]
        uses = [*warm, 4, 5, 6, 7, 0, 4, 5, 6]
        steps = [np.array([[[use]]]) for use in uses]
        found = run(steps, layers=1, experts=8, policy="marking", slots=4)
        survivors.add(tuple(found["hits"][-3:, 0].tolist()))
    assert len(survivors) > 1


def test_the_most_popular_stay_where_popularity_is_given():
    popularity = np.arange(16.0)[::-1]
    rng = np.random.default_rng(3)
    steps = [rng.permutation(16)[:2].reshape(1, 1, 2) for _ in range(300)]
    found = run(steps, layers=1, experts=16, policy="static", slots=8, popularity=popularity)
    for step, hits in list(zip(steps, found["hits"][:, 0], strict=True))[100:]:
        assert hits >= (step < 6).sum()  # two slots are left to the others
    with pytest.raises(ValueError, match="popularity"):
        run(steps, layers=1, experts=16, policy="static", slots=8)


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_the_default_misses_less_than_the_others_and_belady_least(share):
    rng = np.random.default_rng(5)
    sizes = {"layers": 6, "experts": 32}
    steps, begins = random_steps(rng, **sizes, k=4, requests=6, decode=60, prompt=24)
    slots = int(share * 6 * 32)
    misses = {
        name: run(steps, **sizes, policy=name, slots=slots, begins=begins)["misses"].sum()
        for name in (*ONLINE, "belady")
    }
    assert min(misses, key=misses.get) == "belady"
    others = [count for name, count in misses.items() if name not in {"belady", "request"}]
    assert misses["request"] < 0.9 * min(others)


def test_a_prompt_does_not_flush_what_a_stream_is_using():
    rng = np.random.default_rng(8)
    layers, experts = 8, 32
    favourites = np.tile(np.arange(6), (layers, 1))  # a stream in the middle of its answer
    stream = [np.array([[rng.permutation(row)[:2] for row in favourites]]) for _ in range(60)]
    prompt = np.argsort(rng.random((256, layers, experts)), axis=2)[:, :, :2]
    steps = [*stream, prompt, *stream]
    begins = [1.0, *[0.0] * 59, 0.5, *[0.0] * 60]
    misses = {
        name: run(steps, layers=layers, experts=experts, policy=name, slots=96, begins=begins)[
            "misses"
        ][61:].sum()
        for name in ("request", "lru")
    }
    assert misses["lru"] >= 30  # of the 48 that the stream uses
    assert misses["request"] <= 5


@pytest.mark.parametrize("policy", ONLINE)
def test_the_cache_does_what_is_replayed(policy, tmp_path):
    shards = make_shards(tmp_path, layers=3, experts=8, shapes=((8, 64), (8, 64), (64, 8)))
    cache = shards.open(slots=9, policy=policy)
    assert cache.policy == policy
    rng = np.random.default_rng(2)
    steps, begins = random_steps(rng, layers=3, experts=8, k=2, requests=3, decode=25, prompt=5)
    found = run(steps, layers=3, experts=8, policy=policy, slots=9, begins=begins)
    for step, begin in zip(steps, begins, strict=True):
        if begin:
            cache.begin_request(begin)
        for layer in range(3):
            wanted, tokens = np.unique(step[:, layer], return_counts=True)
            cache.prefetch(layer, wanted.tolist(), tokens.tolist(), len(step))
            for expert in wanted.tolist():
                shards.check_expert(cache, layer, expert)
    counters = cache.counters()
    assert counters["hits"] == found["hits"].sum()
    assert counters["misses"] == found["misses"].sum()
    assert counters["evictions"] == found["evictions"]
    cache.close()


def test_routing_whose_parts_do_not_fit_is_refused():
    experts = np.zeros((3, 2, 1), np.uint32)
    good = {
        "experts": experts,
        "tokens": np.array([2, 1], np.uint32),
        "begins": np.zeros(2),
        "num_experts": 4,
        "policy": "lru",
        "slots": 2,
        "popularity": np.zeros(0),
    }
    _core.replay(**good)
    for changed, why in [
        ({"tokens": np.array([2, 2], np.uint32)}, "do not fit"),
        ({"begins": np.zeros(3)}, "do not fit"),
        ({"experts": experts + 4}, "does not have"),
        ({"slots": 0}, "no slots"),
        ({"policy": "clairvoyance"}, "clairvoyance"),
        ({"experts": experts[:, 0]}, "three dimensions"),
    ]:
        with pytest.raises(ValueError, match=why):
            _core.replay(**(good | changed))
