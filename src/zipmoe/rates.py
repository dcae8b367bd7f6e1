"""A machine's rates, as the planner wants them: measured, estimated, or those of a typical one."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from zipmoe._index import INTEGER_BITS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zipmoe.hardware import Profile

__all__ = ["TYPICAL", "MachineProfile", "machine_profile"]

# What a token takes outside products, until a store's own runs say it. Of a layer: norms,
# attention and calls, what a tiny layer takes (python_overhead in benchmarks/results/layer.json).
# Of the whole model: sampling and transformers' own loop.
LAYER_S, TOKEN_S = 125e-6, 3e-3


@dataclass(frozen=True)
class MachineProfile:
    """Measured rates of a machine. Bytes of weights are those in BF16, whatever is read of them."""

    workers: int
    read_bytes_s: float  # of the drive
    # All workers at once, few tokens, by what is multiplied: "raw", and codecs whose planes are
    # multiplied directly.
    multiply_bytes_s: Mapping[str, float]
    decode_bytes_s: Mapping[str, float]  # of one worker, by codec: what is not multiplied directly
    flops: float  # all workers at once, many tokens
    layer_s: float = 0.0  # a token's rest of a layer: attention, norms, and what calls cost
    token_s: float = 0.0  # a token's rest of everything: sampling, calls of Python
    spread: float = 0.1  # relative, of these rates between measurements

    def work_s(self, weights: int, codec: str, tokens: float = 1.0) -> float:
        """Seconds that weights of a codec take one worker."""
        known = codec in self.multiply_bytes_s
        touched = 2 * weights / self.multiply_bytes_s[codec if known else "raw"]
        # Integers are multiplied directly, and no slower than what is stored raw.
        direct = known or codec in INTEGER_BITS
        decode = 0.0 if direct else 2 * weights / self.decode_bytes_s[codec]
        return self.workers * max(touched, 2 * weights * tokens / self.flops) + decode

    def scaled(self, factor: float) -> MachineProfile:
        """Let a token's work, but no prompt's and no reading, take that many times as long."""
        return replace(
            self,
            multiply_bytes_s={name: rate / factor for name, rate in self.multiply_bytes_s.items()},
            decode_bytes_s={name: rate / factor for name, rate in self.decode_bytes_s.items()},
            layer_s=self.layer_s * factor,
            token_s=self.token_s * factor,
        )


# Two cores of a Zen 4 server and a drive of its class.
TYPICAL = MachineProfile(
    workers=2,
    read_bytes_s=2.8e9,
    multiply_bytes_s={"raw": 30e9, "rank3": 37e9, "rank223": 36e9, "rank4": 37e9},
    decode_bytes_s={"zstd": 1.8e9, "lz4hc": 3e9},
    flops=200e9,
)


def machine_profile(measured: Profile) -> MachineProfile:
    """Give the rates that were measured of a machine, and what was not by an estimate."""
    core = measured.core
    rates = [measured.drive.read_bytes_s, core.flops]
    rates += [*core.multiply_bytes_s.values(), *core.decode_bytes_s.values()]
    spreads = [(rate.most - rate.least) / 2 / rate.median for rate in rates]
    return MachineProfile(
        workers=core.workers,
        read_bytes_s=measured.drive.read_bytes_s.median,
        multiply_bytes_s={codec: rate.median for codec, rate in core.multiply_bytes_s.items()},
        decode_bytes_s={codec: rate.median for codec, rate in core.decode_bytes_s.items()},
        flops=core.flops.median,
        layer_s=LAYER_S,
        token_s=TOKEN_S,
        spread=statistics.median(spreads),
    )
