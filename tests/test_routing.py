"""Routing traces: what is recorded comes back, what is damaged is refused, popularity is honest."""

import numpy as np
import pytest

from zipmoe._errors import TraceError
from zipmoe._synthetic_routing import Routing, synthetic_trace
from zipmoe.routing import (
    Recorder,
    Trace,
    by_held_out_prompts,
    by_recency,
    in_hindsight,
    load_trace,
    save_trace,
)

SIZES = Routing(
    num_experts=16, num_layers=3, top_k=2, num_requests=6, prompt_tokens=5, decode_tokens=9
)


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace(SIZES, seed=1)


def fields(trace):
    return {name: getattr(trace, name) for name in ("experts", "step", "request", "tokens")}


def with_field(trace, **changed):
    return Trace(**({"num_experts": trace.num_experts} | fields(trace) | changed))


def test_a_trace_comes_back_from_its_file(trace, tmp_path):
    save_trace(trace, tmp_path / "t.npz")
    again = load_trace(tmp_path / "t.npz")
    assert again.num_experts == trace.num_experts
    for name, array in fields(trace).items():
        assert np.array_equal(getattr(again, name), array)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_what_is_recorded_step_by_step_is_replayed_step_by_step():
    recorder = Recorder(num_experts=4, num_layers=2)
    recorder.step([(7, 2), (8, 1)])
    recorder.layer(1, [[0, 1], [2, 3], [1, 0]])
    recorder.layer(0, [[3, 1], [2, 1], [1, 0]])
    recorder.step([(7, 1), (8, 1)])
    recorder.layer(0, [[0, 2], [0, 3]])
    recorder.layer(1, [[1, 2], [1, 2]])
    first, second = recorder.trace().steps()
    assert (first.is_decode, second.is_decode) == (False, True)
    assert first.requests.tolist() == [7, 8]
    assert first.experts[:, 0].tolist() == [[3, 1], [2, 1], [1, 0]]
    assert [part.tolist() for part in first.activated(0)] == [[0, 1, 2, 3], [1, 3, 1, 1]]
    assert [part.tolist() for part in second.activated(1)] == [[1, 2], [2, 2]]


def test_a_prompt_of_one_token_is_no_decode_step():
    recorder = Recorder(num_experts=4, num_layers=1)
    for number in range(3):
        recorder.step([(0, 1)])
        recorder.layer(0, [[number]])
    assert [step.is_decode for step in recorder.trace().steps()] == [False, True, True]
    assert recorder.trace().counts().tolist() == [[[0, 1, 1, 0]]]


def test_a_step_without_all_of_its_layers_is_refused():
    recorder = Recorder(num_experts=4, num_layers=2)
    with pytest.raises(TraceError, match="no step"):
        recorder.trace()
    recorder.step([(0, 1)])
    recorder.layer(0, [[1]])
    with pytest.raises(TraceError, match="step 0"):
        recorder.trace()


def broken(trace):
    twice = trace.experts.copy()
    twice[3, 1] = 5
    foreign = trace.experts.copy()
    foreign[0, 0, 0] = SIZES.num_experts
    longer = trace.tokens.copy()
    longer[2] += 1
    return {
        "chose an expert twice": {"experts": twice},
        "not within 0 and 15": {"experts": foreign},
        "tokens and 84 are recorded": {"tokens": longer},
        "not in order": {"step": trace.step[::-1]},
        "comes twice in a step": {"step": trace.step // 2},
        "not described alike": {"request": trace.request[1:]},
        "no tokens, layers or choices": {"experts": trace.experts[:, :0]},
    }


@pytest.mark.parametrize("why", broken(synthetic_trace(SIZES, seed=1)))
def test_an_impossible_trace_is_refused(why, trace):
    with pytest.raises(TraceError, match=why):
        with_field(trace, **broken(trace)[why])


def test_files_that_are_no_trace_are_refused_by_name(trace, tmp_path):
    path = tmp_path / "t.npz"
    with pytest.raises(TraceError, match=r"t\.npz"):
        load_trace(path)
    save_trace(trace, path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no trace"):
        path.write_bytes(damaged)
        with pytest.raises(TraceError, match=r"t\.npz"):
            load_trace(path)
    path.write_bytes(whole)
    with np.load(path) as file:
        good = dict(file)
    for changed, why in [
        ({"version": np.array(99)}, "version 99 is unknown"),
        ({"format": np.array("other")}, "format other"),
        ({"experts": good["experts"].astype(float)}, "experts are not whole numbers"),
        ({"experts": good["experts"] + 15}, "not within"),
        ({"experts": np.array([{}], object)}, "cannot be read"),
    ]:
        np.savez(path, **(good | changed))
        with pytest.raises(TraceError, match=why):
            load_trace(path)
    del good["request"]
    np.savez(path, **good)
    with pytest.raises(TraceError, match="lacks request"):
        load_trace(path)
    with path.open("wb") as file:
        np.save(file, good["step"])
    with pytest.raises(TraceError, match="lacks experts"):
        load_trace(path)


def test_requests_are_parted_whole_and_by_seed(trace):
    some, others = trace.split(0.5, seed=3)
    assert sorted([*some.requests, *others.requests]) == list(range(6))
    assert len(some.requests) == 3
    assert len(some.experts) + len(others.experts) == len(trace.experts)
    assert trace.split(0.5, seed=3)[0].requests.tolist() == some.requests.tolist()
    assert np.array_equal(
        np.sort(np.concatenate([some.counts(), others.counts()]), axis=0),
        np.sort(trace.counts(), axis=0),
    )


def test_hindsight_sees_skew_where_there_is_none_and_held_out_prompts_do_not():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(76, np.full(60, 1 / 60), size=(200, 4))
    hindsight = in_hindsight(counts, 4)
    held_out = by_held_out_prompts(counts[::2], counts[1::2], 4)
    assert hindsight.top_share(0.25) > 0.5
    assert held_out.top_share(0.25) == pytest.approx(0.25, abs=0.02)
    for popularity in (hindsight, held_out):
        assert popularity.activated == pytest.approx(4)


def test_no_expert_is_included_with_more_than_certainty():
    counts = np.zeros((1, 1, 6), int)
    counts[0, 0] = [50, 5, 4, 3, 2, 1]
    found = in_hindsight(counts, 3).inclusion
    assert found[0] == 1
    assert found.sum() == pytest.approx(3)
    assert found[1] / found[5] == pytest.approx(5)
    assert found.max() <= 1


def test_recency_gives_the_hits_of_a_cache_that_drops_the_least_recently_used(trace):
    inclusion = by_recency(trace).inclusion
    for slots in (3, 7, 12):
        hits = decodes = 0
        for layer in range(trace.num_layers):
            held = list(range(trace.num_experts))[:slots]  # most recently used first
            for step in trace.steps():
                chosen, tokens = step.activated(layer)
                if step.is_decode:
                    hits += len(set(held) & set(chosen.tolist()))
                    decodes += 1
                recent = [e for _, e in sorted(zip(-tokens, chosen.tolist(), strict=True))]
                held = (recent + [e for e in held if e not in recent])[:slots]
        assert inclusion[:slots].sum() == pytest.approx(hits / decodes)


def test_recency_needs_a_decode_step(trace):
    with pytest.raises(TraceError, match="no decode step"):
        by_recency(
            with_field(
                trace,
                tokens=trace.tokens[:1],
                step=trace.step[:1],
                request=trace.request[:1],
                experts=trace.experts[:5],
            )
        )


def test_synthetic_routing_is_flat_over_all_and_skewed_within_a_conversation():
    sizes = Routing(64, 4, 6, num_requests=80, prompt_tokens=1, decode_tokens=19)
    made = synthetic_trace(sizes, seed=2)
    counts = made.counts()
    popular = -np.sort(-counts.sum(axis=0), axis=1)
    over_all = (popular[:, :16].sum(axis=1) / popular.sum(axis=1)).mean()
    assert 0.34 < over_all < 0.41
    assert by_held_out_prompts(counts[::2], counts[1::2], 6).top_share(0.25) < over_all
    assert 0.58 < in_hindsight(counts, 6).top_share(0.25) < 0.68  # 0.54 of independent choices
    assert 40 < (counts > 0).sum(axis=2).mean() < 47  # distinct experts in 19 tokens
    used = np.zeros((len(made.experts), 4, 64), bool)
    np.put_along_axis(used, made.experts, True, axis=2)
    followed = (made.is_decode[1:])[:, None, None]
    again = (used[1:] & used[:-1] & followed).sum() / (followed.sum() * 4 * 6)
    assert again > 1.7 * 6 / 64  # chosen by the next token too, against chance
    assert np.array_equal(synthetic_trace(sizes, seed=2).experts, made.experts)
    assert not np.array_equal(synthetic_trace(sizes, seed=3).experts, made.experts)
