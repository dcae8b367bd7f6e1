"""A checkpoint's config and keys → expert layers and their recipes, asked of transformers itself.

No name table of ours: the model is built on the meta device, and transformers' conversion mapping
says which keys make which parameter. Unknown families and conversions are refused by name.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import logging as transformers_logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from zipmoe import _symbolic as symbolic
from zipmoe._errors import CheckpointError, UnsupportedModelError
from zipmoe._parts import derive_recipes
from zipmoe._proof import prove
from zipmoe.recipe import Matrix, Recipe, check_coverage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zipmoe.checkpoint import Checkpoint

__all__ = ["ExpertLayer", "ModelPlan", "plan_model"]

REFUSED_FAMILIES = ("llama4", "llama4_text", "dbrx", "jetmoe", "switch_transformers", "nllb-moe")
WHAT_WORKS = (
    "zipmoe runs the families whose experts follow transformers' experts interface, such as "
    "mixtral, qwen2_moe, qwen3_moe, deepseek_v3, gpt_oss, glm4_moe, olmoe and granitemoe "
    "(docs/families.md lists all)"
)


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The routed experts of one module of the model."""

    module: str
    experts: int
    matrices: tuple[Matrix, ...]  # in order of use
    recipes: tuple[Recipe, ...]  # one per matrix


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What a checkpoint holds, as transformers would build it."""

    model_type: str
    architecture: str  # the class that from_pretrained builds
    dtype: str  # what dtype="auto" resolves to
    layers: tuple[ExpertLayer, ...]


@dataclass(slots=True)
class Group:
    """Keys that one converter (or a plain renaming: None) turns into parameters together."""

    converter: Any
    keys: dict[str, list[str]]  # source pattern → keys, in transformers' order


def plan_model(checkpoint: Checkpoint) -> ModelPlan:
    """Find the expert layers of a checkpoint and how they came from its tensors.

    Raises
    ------
    UnsupportedModelError
        A family or conversion that is not supported, or a model without routed experts.
    CheckpointError
        Tensors that the model needs are missing or have another shape.
    """
    config, model_class = _model_class(checkpoint)
    try:
        with _quiet(), torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # whatever a strange config makes of the model's code
        raise CheckpointError(
            f"transformers cannot build {model_class.__name__} from {checkpoint.folder}: {error!r}"
        ) from error
    modules = list(_expert_modules(model))
    if not modules:
        raise UnsupportedModelError(
            f"{checkpoint.folder} is a {config.model_type} model without routed experts; "
            f"{WHAT_WORKS}"
        )
    sources = _expert_sources(checkpoint, model, {path for path, _ in modules})
    layers = tuple(
        _expert_layer(number, path, module, sources)
        for number, (path, module) in enumerate(_without_tied(modules, sources))
    )
    shapes = {key: source.place.shape for key, source in checkpoint.tensors.items()}
    try:
        check_coverage([(x.experts, x.matrices, x.recipes) for x in layers], shapes)
    except ValueError as error:
        raise UnsupportedModelError(
            f"the experts of {checkpoint.folder} cannot be stored exactly: {error}"
        ) from error
    return ModelPlan(
        config.model_type, model_class.__name__, _auto_dtype(config, checkpoint), layers
    )


def _model_class(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """Config and class that AutoModel would take, text models first."""
    named = checkpoint.config.get("model_type")
    if named in REFUSED_FAMILIES:
        raise UnsupportedModelError(f"the family {named} is not supported; {WHAT_WORKS}")
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError, TypeError) as error:
        raise UnsupportedModelError(
            f"transformers has no code of its own for {named!r}, and zipmoe does not run code "
            f"that comes with a checkpoint ({error}); {WHAT_WORKS}"
        ) from error
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            model_class = found[0] if isinstance(found, (list, tuple)) else found
            if model_class.config_class == config.sub_configs.get("text_config", None):
                config = config.get_text_config()
            return config, model_class
    raise UnsupportedModelError(f"{named!r} is not a model that generates text; {WHAT_WORKS}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' advice on configs off the terminal: only cli prints."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _expert_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Modules that hold routed experts: three-dimensional down_proj and gate_up_proj or up_proj.

    Where transformers' experts interface decorates some, others of that shape are not routed
    (inkling's shared experts). Modules tied to another (diffusion_gemma's) are not stored twice.
    """
    found = []
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        tied = f"{path}.down_proj" in model.all_tied_weights_keys
        if "down_proj" in own and own["down_proj"].dim() == 3 and _up_name(own) and not tied:
            found.append((path, module))
    decorated = [(path, module) for path, module in found if hasattr(module, "has_gate")]
    yield from decorated or found


def _without_tied(
    modules: list[tuple[str, Any]], sources: dict[str, symbolic.Symbolic]
) -> list[tuple[str, Any]]:
    """Drop modules that only share the parameters of one that the checkpoint holds."""
    held = {id(module.down_proj) for path, module in modules if f"{path}.down_proj" in sources}
    return [
        (path, module)
        for path, module in modules
        if f"{path}.down_proj" in sources or id(module.down_proj) not in held
    ]


def _up_name(parameters: dict[str, Any]) -> str | None:
    return next((name for name in ("gate_up_proj", "up_proj") if name in parameters), None)


def _expert_sources(
    checkpoint: Checkpoint, model: Any, modules: set[str]
) -> dict[str, symbolic.Symbolic]:
    """Each expert parameter of the model, in terms of the checkpoint's tensors."""
    found: dict[str, symbolic.Symbolic] = {}
    proven: set[Any] = set()
    for name, group in _groups(checkpoint, model).items():
        targets = _target_names(name, group)
        if not any(target.rpartition(".")[0] in modules for target in targets.values()):
            continue
        made = _convert(name, group, checkpoint, model)
        prove(
            name,
            group,
            made,
            targets=targets,
            checkpoint=checkpoint,
            model=model,
            proven=proven,
        )
        found.update({targets[pattern]: value for pattern, value in made.items()})
    return found


def _groups(checkpoint: Checkpoint, model: Any) -> dict[str, Group]:
    """Assign the keys as transformers' loader does: by first target name."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, Group] = {}
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name in state:
            group = groups.setdefault(name, Group(by_pattern.get(pattern), defaultdict(list)))
            group.keys[pattern or key].append(key)
    return groups


def _target_names(name: str, group: Group) -> dict[str, str]:
    """Target pattern → parameter name. A renaming has one target, its name."""
    if group.converter is None:
        return {name: name}
    patterns = group.converter.target_patterns
    if patterns[0] not in name:  # a pattern with a group in it, such as \1: one target only
        return dict.fromkeys(patterns, name)
    return {pattern: name.replace(patterns[0], pattern, 1) for pattern in patterns}


def _convert(
    name: str, group: Group, checkpoint: Checkpoint, model: Any
) -> dict[str, symbolic.Symbolic]:
    values = {
        pattern: [symbolic.whole(key, checkpoint.tensors[key].place.shape) for key in keys]
        for pattern, keys in group.keys.items()
    }
    if group.converter is None:
        if len(group.keys) > 1:
            raise CheckpointError(f"{name} is in the checkpoint twice: {', '.join(group.keys)}")
        return {name: next(iter(values.values()))[0]}
    missing = set(group.converter.source_patterns) - set(values)
    if missing:
        raise CheckpointError(f"the checkpoint has no {', '.join(sorted(missing))} for {name}")
    context = symbolic.Context(
        group.converter.source_patterns,
        group.converter.target_patterns,
        name,
        model,
        model.config,
    )
    try:
        return symbolic.convert(group.converter.operations, values, context)
    except ValueError as error:
        raise CheckpointError(f"the tensors of {name} do not fit together: {error}") from error


def _expert_layer(
    number: int, path: str, module: Any, sources: dict[str, symbolic.Symbolic]
) -> ExpertLayer:
    """Say which matrices a module's experts have, and derive their recipes."""
    own = dict(module.named_parameters(recurse=False))
    up, down = own[str(_up_name(own))], own["down_proj"]
    transposed = getattr(module, "is_transposed", False)
    experts = down.shape[0]  # longcat_flash: gate_up has rows for experts that compute nothing
    tensors = {}
    for name, parameter in ((str(_up_name(own)), up), ("down_proj", down)):
        found = sources.get(f"{path}.{name}")
        if found is None:
            raise CheckpointError(f"the checkpoint has no weights for {path}.{name}")
        if found.shape[1:] != tuple(parameter.shape[1:]) or found.shape[0] < experts:
            raise CheckpointError(
                f"{path}.{name} has shape {found.shape} in the checkpoint, "
                f"the config says {tuple(parameter.shape)}"
            )
        tensors[name] = symbolic.transpose(found, 1, 2) if transposed else found
    parts = _in_order_of_use(module, tensors)
    matrices = tuple(Matrix(role, *value.shape[1:]) for role, value in parts)
    recipes = derive_recipes(path, number, experts, [value for _, value in parts])
    return ExpertLayer(path, experts, matrices, recipes)


def _in_order_of_use(
    module: Any, tensors: dict[str, symbolic.Symbolic]
) -> list[tuple[str, symbolic.Symbolic]]:
    """Split gate_up_proj [experts, 2 * inner, hidden] as the module's attributes say."""
    down = ("down", tensors["down_proj"])
    if "gate_up_proj" not in tensors:
        return [("up", tensors["up_proj"]), down]
    both = tensors["gate_up_proj"]
    rows = both.shape[1]
    if getattr(module, "is_concatenated", True):
        gate = symbolic.take(both, 1, 0, rows // 2)
        up = symbolic.take(both, 1, rows // 2, rows)
    else:
        gate, up = symbolic.take(both, 1, 0, rows, 2), symbolic.take(both, 1, 1, rows, 2)
    return [("gate", gate), ("up", up), down]


def _auto_dtype(config: Any, checkpoint: Checkpoint) -> str:
    """Resolve dtype="auto" as transformers does: the config's, else the first floating tensor's."""
    if getattr(config, "dtype", None) is not None:
        return str(config.dtype).removeprefix("torch.")
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    for shard in checkpoint.shards:
        for place in sorted(shard.header.tensors, key=lambda p: p.name):
            if place.dtype in names:
                return names[place.dtype]
        break  # transformers looks at the first file only
    return "float32"
