"""Each family's attention calls, native against transformers' eager, one by one.

The model runs once with eager attention, every call's inputs and output recorded, and what the same
function says in FP32; then with zipmoe's, each output compared with that and replaced by the
recorded one, so that differences cannot add up or flip a router. So masks, keyword arguments and
sparse selections of the real model code are tested, and not only the function.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from families import Family, randomise, small_config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zipmoe import attention


@dataclass
class Calls:
    """What the attention function was asked, what it answered, and in FP32."""

    inputs: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    exact: list[torch.Tensor] = field(default_factory=list)


@contextlib.contextmanager
def eager_recorded(model: torch.nn.Module, calls: Calls):
    """Record every call of the models' own eager functions."""
    patched = {}
    for name in {type(module).__module__ for module in model.modules()}:
        module = sys.modules[name]
        if hasattr(module, "eager_attention_forward"):
            patched[module] = module.eager_attention_forward

    def recording(eager):
        def call(module, query, key, value, attention_mask, **kwargs):
            out = eager(module, query, key, value, attention_mask, **kwargs)
            calls.inputs.append((query.clone(), key.clone(), value.clone()))
            calls.outputs.append(out[0].clone())
            wide = (query.float(), key.float(), value.float())
            calls.exact.append(eager(module, *wide, attention_mask, **kwargs)[0])
            return out

        return call

    for module, eager in patched.items():
        module.eager_attention_forward = recording(eager)
    try:
        yield
    finally:
        for module, eager in patched.items():
            module.eager_attention_forward = eager


@contextlib.contextmanager
def native_compared(calls: Calls, errors: list[str]):
    """Compare each native call with the recorded one, whose output is then used."""
    left = list(zip(calls.inputs, calls.outputs, calls.exact, strict=True))

    def call(module, query, key, value, attention_mask, **kwargs):
        out, _ = attention.attention_forward(module, query, key, value, attention_mask, **kwargs)
        inputs, expected, exact = left.pop(0)
        for mine, theirs in zip((query, key, value), inputs, strict=True):
            if not torch.equal(mine, theirs):
                errors.append("other inputs")
        seen = (out != 0).any(-1, keepdim=True)  # rows of padding see nothing
        error = ((out - exact) * seen).abs() - exact.abs() * 2.0**-8
        if not error.max() <= 2e-4 * value.abs().max():  # of FP32 itself, at scores up to 100
            errors.append(f"{type(module).__name__}: off by {error.max():.4f}")
        return expected, None

    ALL_ATTENTION_FUNCTIONS.register(attention.IMPLEMENTATION, call)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(attention.IMPLEMENTATION, attention.attention_forward)
    if left:
        errors.append(f"{len(left)} calls are missing")


def build(family: Family) -> Any:
    """Build a tiny random model in BF16."""
    attention.register()
    torch.manual_seed(0)
    auto = getattr(transformers, family.auto)
    model = auto.from_config(
        small_config(family), dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    randomise(model)
    return model


@torch.inference_mode()
def scenario(model: Any, name: str) -> None:
    """Run the model: a prompt; a padded batch; tokens after a prompt; a prompt in chunks."""
    torch.manual_seed(1)  # for families that begin with noise
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (2, 41), generator=generator)
    if name == "prompt":
        model(input_ids=ids[:1], use_cache=False)
    elif name == "padded":
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    elif name == "static":
        model.generate(
            input_ids=ids[:1],
            max_new_tokens=3,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
        )
    elif name == "chunks":
        past = model(input_ids=ids[:1, :20], use_cache=True).past_key_values
        model(input_ids=ids[:1, 20:], past_key_values=past, use_cache=True)


SCENARIOS = ("prompt", "padded", "static", "chunks")


def differences(family: Family, scenarios: tuple[str, ...] = SCENARIOS) -> tuple[int, list[str]]:
    """Return how many calls were compared, and what was wrong."""
    model = build(family)
    compared, errors = 0, []
    for name in scenarios:
        calls = Calls()
        model.set_attn_implementation("eager")
        try:
            with eager_recorded(model, calls):
                scenario(model, name)
        except Exception as error:  # noqa: BLE001 - the family itself cannot do it
            errors.append(f"{name}: stock fails: {error!r}")
            continue
        found: list[str] = []
        model.set_attn_implementation(attention.IMPLEMENTATION)
        with native_compared(calls, found):
            scenario(model, name)
        compared += len(calls.outputs)
        errors += [f"{name}: {text}" for text in found]
    return compared, errors
