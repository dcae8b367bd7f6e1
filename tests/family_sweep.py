"""One family: checkpoint → pack → load → the same bits as stock transformers, or why not.

docs/families.md is written from the outcomes (tools/generate_families.py).
"""

from __future__ import annotations

import importlib
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import doubles
import torch
import transformers
from families import (
    LOOK_ALIKES,
    REFUSED,
    SMALL,
    Answers,
    Family,
    answers,
    families,
    write_checkpoint,
)
from invariance import CHECKS, dependencies
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import zipmoe
from zipmoe._outside import OUTSIDE
from zipmoe.experts import ExpertLayer, ExpertSource, bind, experts_forward

if TYPE_CHECKING:
    from pathlib import Path

FULL, FORWARD_ONLY, REFUSES = "full", "forward only", "refused"


@dataclass
class Outcome:
    """What became of one family. `differences` is empty where everything is the same bits."""

    family: str
    status: str
    architecture: str
    experts: str
    differences: list[str] = field(default_factory=list)
    # What native logits of a token depend on besides its own past.
    depends_on: list[str] = field(default_factory=list)


def stock_model(family: Family, checkpoint: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model as transformers loads it, with its default experts (grouped_mm)."""
    model = getattr(transformers, family.auto).from_pretrained(checkpoint, dtype=dtype)
    chosen = {m.config._experts_implementation for m in model.modules() if hasattr(m, "has_gate")}
    assert chosen == (set() if family.name in LOOK_ALIKES else {"grouped_mm"}), chosen
    return model


def sweep(family: Family, folder: Path, *, tied: bool | None = None, seed: int = 0) -> Outcome:
    """Run one family in full where a language model of it can be built, else module by module."""
    if family.auto is None:
        architecture, experts, same = forward_only(family.name)
        differences = [] if same else ["one forward pass"]
        return Outcome(family.name, FORWARD_ONLY, architecture, experts, differences)
    checkpoint, store = folder / f"{family.name}-checkpoint", folder / f"{family.name}-store"
    write_checkpoint(family, checkpoint, seed, tied=tied)
    stock = stock_model(family, checkpoint)
    expected = answers(stock)
    outcome = Outcome(family.name, FULL, type(stock).__name__, describe(stock))
    zipmoe.pack_checkpoint(checkpoint, store)
    outcome.differences = compare(expected, store)
    with zipmoe.load(store, memory="64GB") as loaded:
        # Whether one prompt shows a dependence is luck: once seen, it stays stated.
        seen = {*dependencies(loaded.model), *OUTSIDE.get(family.name, ())}
        outcome.depends_on = [check for check in CHECKS if check in seen]
    shutil.rmtree(checkpoint)
    shutil.rmtree(store)
    return outcome


def compare(expected: Answers, store: Path) -> list[str]:
    """Load a store and say where it answers otherwise than expected.

    Raises LossyError for a store that is not to give stock's bits at all.
    """
    with zipmoe.load(store, memory="64GB", compute="torch") as loaded:
        if loaded.runtime.lossy:
            raise zipmoe.LossyError(f"{store} is {loaded.runtime.lossy.summary()}")
        differences = expected.differences(answers(loaded.model))
        counters = loaded.runtime.cache.counters()
        assert counters["hits"] + counters["misses"] > 0, "no expert was asked for"
    return differences


def describe(model: Any) -> str:
    """What the experts of a model look like, in words."""
    (_, module), *_ = doubles.expert_modules(model)
    words = ["gate and up" if hasattr(module, "gate_up_proj") else "up only"]
    if getattr(module, "is_transposed", False):
        words.append("transposed")
    if not getattr(module, "is_concatenated", True):
        words.append("interleaved")
    if getattr(module, "has_bias", False):
        words.append("bias")
    if getattr(module, "has_post_expert_norm", False):
        words.append("norm after each expert")
    if not hasattr(module, "has_gate"):
        words.append("own forward")
    return ", ".join(words)


def forward_only(name: str) -> tuple[str, str, bool]:
    """Run the experts module of a family that builds no language model; is it grouped_mm's bits?"""
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    (experts_class,) = (
        value
        for key, value in vars(modeling).items()
        if key.endswith("Experts") and value.__module__ == modeling.__name__
    )
    default = CONFIG_MAPPING[name]()
    config = type(default)(**{k: v for k, v in SMALL.items() if k in vars(default)})
    torch.manual_seed(0)
    module = experts_class(config).to(torch.bfloat16)
    for weight in module.parameters():
        weight.data.normal_()
    host = torch.nn.Module()
    host.experts = module
    hidden = torch.randn(9, config.hidden_size, dtype=torch.bfloat16)
    index = torch.stack([torch.randperm(module.num_experts)[:2] for _ in range(9)])
    weights = torch.rand(9, 2).to(torch.bfloat16)
    config._experts_implementation = "grouped_mm"
    with torch.no_grad():
        expected = module(hidden, index, weights)
        described = describe(host)
        rebind(host)
        return (
            experts_class.__name__,
            described,
            torch.equal(experts_forward(module, hidden, index, weights), expected),
        )


def rebind(host: torch.nn.Module) -> doubles.FakeCache:
    """Give the experts modules of a stock model stand-ins over a fake cache of their weights."""
    cache = doubles.FakeCache(doubles.fake_weights(host))
    source = ExpertSource(cache, [])
    for ordinal, (name, module) in enumerate(doubles.expert_modules(host)):
        shapes = {role: tuple(w.shape) for role, w in doubles.matrices(module, 0).items()}
        layer = ExpertLayer(
            ordinal,
            name,
            module.down_proj.shape[0],
            tuple(shapes),
            tuple(shapes.values()),
            module.down_proj.dtype,
        )
        source.layers.append(layer)
        bind(module, source, layer)
    return cache


def row(outcome: Outcome) -> str:
    """A family's line of docs/families.md, its name left out."""
    company = ", ".join(outcome.depends_on) and f"not {', '.join(outcome.depends_on)}"
    company = (company or "yes") if outcome.status == FULL else ""
    return f"| {outcome.status} | `{outcome.architecture}` | {outcome.experts} | {company} |"


def outside(outcomes: list[Outcome]) -> str:
    """src/zipmoe/_outside.py as it should be."""
    lines = []
    for outcome in outcomes:
        names = ", ".join(f'"{name}"' for name in outcome.depends_on)
        if names:
            comma = "," if len(outcome.depends_on) == 1 else ""
            lines.append(f'    "{outcome.family}": ({names}{comma}),')
    head = [
        '"""Families whose native bits depend on more than a token\'s own past."""',
        "",
        "# Written by tools/generate_families.py from the sweep in tests/; do not edit.",
        "OUTSIDE = {",
    ]
    return "\n".join([*head, *lines, "}", ""])


def table(outcomes: list[Outcome]) -> str:
    """docs/families.md as it should be."""
    counts = {s: sum(o.status == s for o in outcomes) for s in (FULL, FORWARD_ONLY)}
    lines = [
        "# Model families",
        "",
        "<!-- Written by tools/generate_families.py from the sweep in tests/; do not edit. -->",
        "",
        (
            f"Every family that the experts interface of transformers {transformers.__version__}"
            " decorates, and two of the same shape that it does not."
        ),
        "",
        (
            "- **full**: a tiny random checkpoint (sharded, embeddings tied and not) is packed and"
            " loaded; logits of a prompt and of 24 greedy tokens, at batch 1 and 4, are bit for bit"
            " those of stock transformers with its default experts path, `grouped_mm` (of the two"
            " that are not decorated: with their own)."
        ),
        (
            "- **forward only**: transformers builds no text generator of this family; one forward"
            " pass of its experts module is bit for bit that of `grouped_mm`."
        ),
        (
            "- **same bits in any company**: with native compute, logits of a prompt are the same"
            " bits alone, in batches of 2, 3, 5, 8 and 17, cut into pieces with a reused cache, and"
            " left-padded beside longer prompts; or what of these changes them"
            " ([kernels.md](kernels.md))."
        ),
        "- **refused**: `zipmoe pack` says so by name.",
        "",
        "Families that also see or hear are tested, and generate, with text only.",
        "",
        f"{counts[FULL]} full, {counts[FORWARD_ONLY]} forward only, {len(REFUSED)} refused.",
        "",
        "| family | status | class | experts | same bits in any company |",
        "|---|---|---|---|---|",
    ]
    rows = {o.family: row(o) for o in outcomes}
    rows |= {name: f"| {REFUSES} | | {reason} | |" for name, reason in REFUSED.items()}
    lines += [f"| {name} {row}" for name, row in sorted(rows.items())]
    return "\n".join(lines) + "\n"


def sweep_all(folder: Path, *, tied: bool | None = None, seed: int = 0) -> list[Outcome]:
    """All families."""
    return [sweep(family, folder, tied=tied, seed=seed) for family in families()]
