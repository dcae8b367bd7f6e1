"""What a lossy store says of itself: the manifest's object `lossy` ↔ plain objects. Pure."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LOSSLESS_BITS", "Loss", "Lossy"]

LOSSLESS_BITS = 16  # of an expert that kept every bit
WIDTHS = (8, 4, 2)
METRICS = ("perplexity", "accuracy")
SCALE_GROUPS = (64, 0)  # weights that share a scale; 0: a row


@dataclass(frozen=True, slots=True)
class Loss:
    """What was measured when the widths were chosen; None where nothing was.

    metric: "perplexity" or "accuracy". target, reached: relative loss of it, 0.02 for 2 %.
    calibration_sha256: of the text it was measured on.
    """

    metric: str | None = None
    target: float | None = None
    reached: float | None = None
    calibration_sha256: str | None = None

    def __post_init__(self) -> None:
        if self.metric not in (None, *METRICS):
            raise ValueError(f"metric {self.metric!r} is none of {', '.join(METRICS)}")
        for value in (self.target, self.reached):
            if value is not None and (type(value) is not float or not math.isfinite(value)):
                raise ValueError(f"{value!r} is not a loss")
        digest = self.calibration_sha256
        if digest is not None and (
            not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest)
        ):
            raise ValueError(f"{digest!r} is not a SHA-256")


@dataclass(frozen=True, slots=True)
class Lossy:
    """Bits of each expert of each layer (16: it is lossless), and what that costs."""

    bits: tuple[tuple[int, ...], ...]  # by layer, by expert
    scale_group: int
    loss: Loss = Loss()

    def __post_init__(self) -> None:
        found = {bits for layer in self.bits for bits in layer}
        if unknown := found - {*WIDTHS, LOSSLESS_BITS}:
            raise ValueError(f"an expert cannot have {min(unknown)} bits: 16, 8, 4 or 2")
        if not found & {*WIDTHS}:
            raise ValueError("no expert has fewer bits: that is no lossy store")
        if self.scale_group not in SCALE_GROUPS:
            raise ValueError("a scale is for 64 weights, or for a row (0)")

    def counts(self) -> dict[str, int]:
        """Say how many experts have each width, "lossless" or "int8" to "int2", widest first."""
        return _counts([bits for layer in self.bits for bits in layer])

    def counts_by_layer(self) -> list[dict[str, int]]:
        """Say the same of each layer."""
        return [_counts(layer) for layer in self.bits]

    def codec(self) -> str:
        """Name the integer codec that most experts have."""
        found = Counter(bits for layer in self.bits for bits in layer if bits != LOSSLESS_BITS)
        return _name(max(sorted(found), key=lambda bits: found[bits]))

    def summary(self) -> str:
        """Say in a line that the store is lossy, and how much."""
        shares = ", ".join(f"{count} {name}" for name, count in self.counts().items())
        text = f"lossy: not the published weights; experts: {shares}"
        if self.loss.reached is not None:
            text += f"; {self.loss.metric or 'measured'} loss {self.loss.reached:.2%}"
        if self.loss.target is not None:
            text += f" (asked for: at most {self.loss.target:.2%})"
        return text

    def brief(self) -> dict[str, Any]:
        """Give what config.json says: experts by width, not one by one."""
        return {"experts": self.counts(), "scale_group": self.scale_group} | asdict(self.loss)

    def dump(self) -> dict[str, Any]:
        """Give the manifest's object."""
        bits = [list(layer) for layer in self.bits]
        return {"bits": bits, "scale_group": self.scale_group} | asdict(self.loss)

    @staticmethod
    def parse(content: Any) -> Lossy:
        """Read the manifest's object; TypeError, KeyError or ValueError where it is malformed."""
        if not isinstance(content, dict) or content.keys() != _KEYS:
            raise ValueError(f"`lossy` must have just the keys {', '.join(sorted(_KEYS))}")
        bits = content["bits"]
        if not isinstance(bits, list) or not all(isinstance(layer, list) for layer in bits):
            raise TypeError("`lossy.bits` is not a list for each layer")
        numbers = [*(value for layer in bits for value in layer), content["scale_group"]]
        if not all(type(value) is int for value in numbers):
            raise TypeError("`lossy.bits` and `lossy.scale_group` are not whole numbers")
        loss = Loss(**{key: content[key] for key in asdict(Loss())})
        return Lossy(tuple(tuple(layer) for layer in bits), content["scale_group"], loss)


def _counts(bits: Sequence[int]) -> dict[str, int]:
    found = Counter(bits)
    return {_name(width): found[width] for width in (LOSSLESS_BITS, *WIDTHS) if found[width]}


def _name(bits: int) -> str:
    return "lossless" if bits == LOSSLESS_BITS else f"int{bits}"


_KEYS = {"bits", "scale_group", *asdict(Loss())}
