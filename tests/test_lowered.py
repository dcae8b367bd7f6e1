"""Experts lowered in a loaded model: the bits a lossy store would give, measured and ranked."""

import json
import math

import numpy as np
import pytest
import torch
from small_store import write_store
from transformers import AutoModelForCausalLM, AutoTokenizer

from zipmoe import importance
from zipmoe._errors import CalibrationError
from zipmoe._losses import KnownFacts
from zipmoe._measuring import Measuring, loaded_to_measure
from zipmoe.calibration import Item, calibration, read_text
from zipmoe.importance import spearman
from zipmoe.lowered import LOSSLESS, LoweredExperts
from zipmoe.quality import Quality, QualityLoss, loss_of, measure, token_losses
from zipmoe.rounding import Rounding
from zipmoe.widths import uniform

WINDOW = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lowered")
    write_store(folder)
    return folder


@pytest.fixture
def measuring(folder, tmp_path):
    with loaded_to_measure(folder / "store", 64 * 10**9, WINDOW) as loaded:
        text = read_text(None)[:2000]
        measured_on = calibration(loaded.tokenizer, text, window=WINDOW)
        yield Measuring(loaded, measured_on, known=KnownFacts(tmp_path / "facts", ""))


def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.bfloat16).eval()


def test_without_lowering_the_loss_is_that_of_the_stock_model(folder, measuring):
    windows = measuring._calibration.windows
    expected = token_losses(stock(folder), windows).mean().item()
    assert measuring.quality({}).nll == pytest.approx(expected, abs=1e-6)
    assert measuring.loss(uniform(measuring.places, LOSSLESS)) == QualityLoss(0, 0)


@pytest.mark.parametrize("keep", [0, 10_000, 10**9])
def test_what_is_decoded_is_what_the_codec_gives_back(measuring, keep):
    source = measuring.lowered
    rounding = Rounding(64)
    lowered = LoweredExperts(source._cache, rounding, keep_bytes=keep)
    shapes = measuring._model.zipmoe.source.layers[0].shapes
    for widths in ({}, {(0, 1): "int4"}, {(0, 1): "int2", (0, 2): "int8"}, {(0, 2): "int8"}):
        lowered.set_widths(widths)
        for _ in range(2):
            lowered.prefetch(0, [1, 2], [1, 1], 2)
            for expert in (1, 2):
                for matrix, shape in enumerate(shapes):
                    found, plain = (np.empty(shape, np.uint16) for _ in range(2))
                    lowered.decode(0, expert, matrix, found)
                    source._cache.prefetch(0, [expert], [1], 1)
                    for number, other in enumerate(shapes):
                        spare = plain if number == matrix else np.empty(other, np.uint16)
                        source._cache.decode(0, expert, number, spare)
                    weights = torch.from_numpy(plain).view(torch.bfloat16)
                    width = widths.get((0, expert))
                    expected = weights
                    if width is not None:
                        expected = rounding.decode(rounding.encode(weights, width))
                    assert np.array_equal(found, expected.view(torch.uint16).numpy())


def test_fewer_bits_change_more(measuring):
    windows = measuring._calibration.windows
    plain = token_losses(measuring._model, windows)
    changes = []
    for width in ("int8", "int4", "int2"):
        measuring.lowered.set_widths(uniform(measuring.places, width))
        changes.append((token_losses(measuring._model, windows) - plain).square().mean().item())
    assert 0 < changes[0] < changes[1] < changes[2]


def test_gradients_through_lowered_experts_are_those_of_the_stock_model(folder, measuring):
    model, windows = measuring._model, measuring._calibration.windows[:1]
    seen = {}

    def keep(name):
        def hook(_, __, out):
            seen[name] = out
            out.retain_grad()

        return hook

    for name, one in (("stock", stock(folder)), ("ours", model)):
        handle = one.get_input_embeddings().register_forward_hook(keep(name))
        if name == "ours":
            collected = importance._Collected(measuring.lowered, ["int4"])
            hooks = [m.register_forward_hook(collected.hook) for m in importance._experts(one)]
        one(windows, labels=windows).loss.backward()
        handle.remove()
    for hook in hooks:
        hook.remove()
    ours, expected = (seen[name].grad.float() for name in ("ours", "stock"))
    assert (ours - expected).norm() < 0.05 * expected.norm()
    assert min(collected.sums["int4"].values()) > 0


def test_the_estimate_ranks_experts_as_measuring_each_of_them_does(measuring):
    expected = measuring.errors(["int2"])["int2"]
    before = measuring.quality({}).nll
    losses = {p: measuring.quality({p: "int2"}).nll - before for p in measuring.places}
    assert min(expected.values()) >= 0
    # Losses of one text have a sign that no estimate for other texts can have.
    order = list(measuring.places)
    found = spearman([expected[p] for p in order], [abs(losses[p]) for p in order])
    assert found > 0.3


def test_what_was_measured_is_not_measured_again(measuring, monkeypatch):
    first = measuring.quality({(0, 0): "int2"})
    done = []
    measuring.after_pass = lambda: done.append(measuring.passes_done)
    monkeypatch.setattr(measuring, "_measure", None)
    assert measuring.quality({(0, 0): "int2"}) == first
    assert done == [2 * measuring.passes]


def test_accuracy_is_the_share_of_answers_that_greedy_decoding_gives(measuring):
    model = measuring._model
    tokenizer = AutoTokenizer.from_pretrained(model.zipmoe.folder)
    prompts = ["one", "two and a half", "three"]
    tasks = []
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        answer = out[0, ids.shape[1] :].tolist()
        tasks.append((ids[0].tolist(), answer if number else [answer[0], 5, 5]))
    measured_on = calibration(tokenizer, "some text", window=WINDOW)
    items = tuple(Item(tuple(prompt), tuple(answer)) for prompt, answer in tasks)
    object.__setattr__(measured_on, "items", items)
    assert measure(model, measured_on).accuracy == pytest.approx(2 / 3)


def test_losses_are_relative_for_perplexity_and_points_for_accuracy():
    before = Quality((1.0, 3.0, 2.0), (True, True, False, True))
    now = Quality(tuple(x + math.log(1.02) for x in before.windows), (True, False, False, True))
    assert now.accuracy == 0.5
    assert now.perplexity == pytest.approx(1.02 * math.exp(2))
    found = loss_of(now, before, "perplexity")
    assert found.mean == found.bound == pytest.approx(0.02)  # all windows lose the same
    assert loss_of(now, before, "accuracy").mean == pytest.approx(0.25)
    assert loss_of(now, before, "accuracy").bound == pytest.approx(0.25 + 1.645 * 0.5 / 2)


def test_the_bound_holds_for_other_texts_nineteen_times_of_twenty():
    rng = np.random.default_rng(1)
    before, held = Quality((2.0,) * 24), 0
    for _ in range(2000):
        now = Quality(tuple(2.0 + rng.normal(0.02, 0.03, 24)))
        held += loss_of(now, before, "perplexity").bound >= math.expm1(0.02)
    assert 0.93 < held / 2000 < 0.97


def test_a_text_is_cut_into_windows_and_hashed(measuring):
    tokenizer = AutoTokenizer.from_pretrained(measuring._model.zipmoe.folder)
    text = "abcdefghij" * 10
    found = calibration(tokenizer, text, window=32)
    assert found.windows.shape == (3, 32)
    assert found.windows.flatten().tolist() == tokenizer(text)["input_ids"][:96]
    assert calibration(tokenizer, "short", window=32).windows.shape == (1, 5)
    task = json.dumps({"prompt": "1+1=", "answer": "2"})
    other = calibration(tokenizer, text, task, window=32)
    assert other.items[0].answer == tuple(tokenizer("2")["input_ids"])
    assert len({found.sha256, other.sha256}) == 2


@pytest.mark.parametrize(
    ("text", "task", "why"),
    [
        ("x", None, "less than two tokens"),
        ("text", '{"prompt": "a"}', "line 1"),
        ("text", '\n{"prompt": "a", "answer": ""}', "line 2"),
        ("text", "[]", "line 1"),
        ("text", "\n", "no tasks"),
    ],
)
def test_what_nothing_can_be_measured_on_is_refused(measuring, text, task, why):
    tokenizer = AutoTokenizer.from_pretrained(measuring._model.zipmoe.folder)
    with pytest.raises(CalibrationError, match=why):
        calibration(tokenizer, text, task)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "t").write_bytes(b"\xff\xfe\x00")
    for name in ("t", "absent"):
        with pytest.raises(CalibrationError, match="cannot be read"):
            read_text(tmp_path / name)
