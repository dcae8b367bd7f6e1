"""What the exponents of weights carry, and how near the codecs come to it.

Of every BF16 matrix of a checkpoint (default: the demo model, whose weights were trained) the
entropy of its exponents, by what the matrix is for. A weight needs 8 bits beside it: sign and
mantissa, which are as good as random. Of some matrices of each sort, drawn with a fixed seed, the
bytes that each codec takes. Counterpart of the exponent figures of the ZipMoE paper
(arXiv 2601.21198).

    python benchmarks/entropy.py [CHECKPOINT] [--sample 12] [--out benchmarks/results/entropy.json]
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from document import publish
from machine import describe_machine
from safetensors import safe_open
from workers import spread

from zipmoe import _core, demo

if TYPE_CHECKING:
    from collections.abc import Iterator

CODECS = ("rank223", "rank3", "rank4", "zstd", "lz4hc")
SORTS = {
    "experts: gate and up": r"\.experts\..*(gate|up|w1\.|w3\.)",
    "experts: down": r"\.experts\..*(down|w2\.)",
    "shared experts and dense MLPs": r"\.(mlp|shared_expert\w*)\.(gate|up|down)_proj",
    "attention": r"attn",
    "embedding and head": r"embed|lm_head",
}


def matrices(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Give the name and the words of each matrix; experts that lie in one tensor one by one."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if tensor.dtype == torch.bfloat16 and tensor.ndim in (2, 3):
                    words = tensor.view(torch.int16).numpy().view(np.uint16)
                    for matrix in words if words.ndim == 3 else [words]:
                        yield name, matrix


def sort_of(name: str) -> str | None:
    return next((sort for sort, pattern in SORTS.items() if re.search(pattern, name)), None)


def entropy(words: np.ndarray) -> float:
    """Bits an exponent carries if it is drawn from the matrix's own distribution."""
    counts = np.bincount(((words >> 7) & 0xFF).ravel())
    shares = counts[counts > 0] / words.size
    return float(-(shares * np.log2(shares)).sum())


def coded_bits(codec: str, words: np.ndarray) -> float:
    """Bits a weight takes, padding and tables included."""
    extents = _core.encode(codec, np.ascontiguousarray(words), threads=1).extents
    return 8 * sum(extent.size for extent in extents) / words.size


@dataclass
class Sort:
    """Matrices of one sort: the entropies of all, and a sample of them."""

    entropies: list[float] = field(default_factory=list)
    sample: list[tuple[float, np.ndarray]] = field(default_factory=list)

    def add(self, words: np.ndarray, most: int, rng: random.Random) -> None:
        self.entropies.append(entropy(words))
        place = len(self.sample)
        if place == most:  # each matrix stays with the same probability
            place = rng.randrange(len(self.entropies))
        if place < most:
            self.sample[place : place + 1] = [(self.entropies[-1], words.copy())]

    def summary(self) -> dict[str, Any]:
        bits = {
            codec: statistics.fmean(coded_bits(codec, words) for _, words in self.sample)
            for codec in CODECS
        }
        bits["entropy"] = 8 + statistics.fmean(carried for carried, _ in self.sample)
        return {
            "matrices": len(self.entropies),
            "entropy_bits": spread(self.entropies),
            "sampled": len(self.sample),
            "bits_a_weight": {name: round(value, 3) for name, value in bits.items()},
        }


def measure(folder: Path, most: int) -> list[dict[str, Any]]:
    sorts = {name: Sort() for name in SORTS}
    rng = random.Random(0)
    for name, words in matrices(folder):
        sort = sort_of(name)
        if sort is not None:
            sorts[sort].add(words, most, rng)
    return [{"sort": name} | sort.summary() for name, sort in sorts.items() if sort.entropies]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="default: the demo model")
    parser.add_argument("--sample", type=int, default=12, help="matrices of a sort to encode")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.checkpoint or demo.build_checkpoint(demo.cache_folder()).folder
    document = {
        "benchmark": "entropy",
        "machine": describe_machine(),
        "model": options.checkpoint.name if options.checkpoint else "the demo model",
        "sorts": measure(folder, options.sample),
    }
    publish(document, options.out)


if __name__ == "__main__":
    main()
