"""Memory: a number from the user → how it is shared out, or a refusal that says why.

Pure arithmetic, plus small readers of what Linux says about this process and machine. Nothing
here allocates, and nothing here knows torch, the store or transformers: whoever knows a size
passes it in.

docs/decisions/0009-memory-budget.md says what each share is and how it was measured.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from zipmoe._errors import BudgetError
from zipmoe._process import peak_rss_bytes, rss_bytes

__all__ = [
    "Activations",
    "Available",
    "MemoryReport",
    "Needs",
    "available_memory",
    "base_bytes",
    "format_bytes",
    "parse_memory",
    "peak_rss_bytes",
    "plan",
    "rss_bytes",
]

_UNITS = {
    "": 1,
    "b": 1,
    **{
        f"{letter}{suffix}": 1000**power
        for power, letter in enumerate("kmgt", 1)
        for suffix in ("", "b")
    },
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}

# What the process grows by between the measurement of its base and the first token, besides what
# is counted: code of torch that is first touched then, compiled kernels of oneDNN, stacks of
# threads, the tokenizer, Python's own objects for the model. Measured:
# docs/decisions/0009-memory-budget.md.
RUNTIME_GROWTH_BYTES = 120_000_000
# Least that is counted for the base, somewhat more than a process that does nothing else comes
# to: so the floor is the same in every run, and granting the floor that a refusal names works.
LEAST_BASE_BYTES = 500_000_000
# Of the default budget, what is left to the rest of the machine.
RESERVE_FRACTION = 0.10
RESERVE_BYTES = 256_000_000
# Tokens of a step that runs while a longer pass is suspended: the engine has room for both.
URGENT_TOKENS = 64


def parse_memory(text: str | int) -> int:
    """Bytes of "2GB" (10^9), "2GiB" (2^30), "512MB", "1.5g" or a plain number.

    Raises
    ------
    ValueError
        For anything else.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        value = text
    else:
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", str(text))
        if not found or found[2].lower() not in _UNITS:
            raise ValueError(
                f"{text!r} is not an amount of memory: write 2GB, 1.5GiB, 512MB or plain bytes"
            )
        value = int(float(found[1]) * _UNITS[found[2].lower()])
    if value <= 0:
        raise ValueError(f"an amount of memory must be positive, not {text!r}")
    return value


def format_bytes(count: float) -> str:
    """Decimal units, as `parse_memory` reads them: 1234567890 is "1.23 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{int(count)} bytes"


@dataclass(frozen=True)
class Available:
    """How much memory this process may come to use, and what says so."""

    bytes: int
    limited_by: str  # "cgroup" or "machine"

    @property
    def budget(self) -> int:
        """The default for --memory: what is available less the reserve."""
        return int(self.bytes - max(self.bytes * RESERVE_FRACTION, RESERVE_BYTES))


def available_memory(root: Path = Path("/")) -> Available:
    """Find what machine and cgroups (v1, v2) leave to this process, its present memory included."""
    own = rss_bytes()
    meminfo = dict(re.findall(r"(\w+):\s+(\d+) kB", (root / "proc/meminfo").read_text()))
    machine = int(meminfo["MemAvailable"]) * 1024 + own
    groups = [limit - used + own for limit, used in _cgroup_limits(root)]
    if groups and min(groups) < machine:
        return Available(max(min(groups), 0), "cgroup")
    return Available(machine, "machine")


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """List (limit, use that cannot be reclaimed) of each limited memory cgroup of this process."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A container often sees its own group as the root, whatever the path says.
        steps = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(steps) + 1):
            entry = _read_group(base.joinpath(*steps[:depth]), names)
            if entry:
                found.append(entry)
    return found


def _read_group(folder: Path, names: tuple[str, str, str]) -> tuple[int, int] | None:
    try:
        limit = (folder / names[0]).read_text().strip()
        used = int((folder / names[1]).read_text())
        stat = dict(
            re.findall(r"^(\w+) (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        )
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= 1 << 60:
        return None
    return int(limit), used - min(used, int(stat.get(names[2], 0)))


@dataclass(frozen=True)
class Activations:
    """What a forward pass over a prompt needs, by the widths of the model."""

    hidden: int  # width of the residual stream
    widest: int  # outputs of the widest linear layer but the vocabulary's
    top_k: int
    expert_width: int  # outputs of gate and up together
    vocabulary: int
    element_bytes: int
    quadratic_heads: int = 0  # heads whose [tokens, tokens] scores are held whole (eager attention)
    masked: bool = False  # whether an attention mask [tokens, tokens] is built
    whole_experts: bool = False  # activations of all experts at once (zipmoe.experts says when)
    one_call: bool = False  # the engine runs a layer's experts in one call

    def bytes(self, tokens: int) -> int:
        """Peak of one pass over that many tokens, batch 1, without what experts decode into.

        Twelve residual-sized tensors (states, norms in FP32, attention's inputs and outputs),
        three of the widest layer, the experts' outputs of all chosen slots and one expert's
        activations, logits of one token.
        """
        row = 12 * self.hidden * self.element_bytes + 3 * self.widest * self.element_bytes
        scores = self.quadratic_heads * (4 * self.element_bytes + 4) + 9 * self.masked
        rest = tokens * row + tokens * tokens * scores + 16 * self.vocabulary
        return rest + self.experts_bytes(tokens)

    def experts_bytes(self, tokens: int) -> int:
        """Count the experts' part: outputs of all chosen slots, activations of one expert.

        In one call: sums in FP32, outputs, and one expert's states and activations, to which all
        tokens may go, for an urgent step too; and what each thread of a few decodes and adds up in.
        """
        if self.one_call:
            per_token = 8 * self.hidden + self.expert_width
            return (tokens + URGENT_TOKENS) * per_token + (16 << 20)
        wide = 3 * self.expert_width * (self.top_k if self.whole_experts else 1)
        return tokens * self.element_bytes * (self.top_k * self.hidden + wide)


@dataclass(frozen=True)
class Needs:
    """Sizes in bytes that a model needs, whatever the budget."""

    base: int  # the process before weights
    dense: int  # dense weights, resident
    kv: int  # KV cache and recurrent states for the whole context
    scratch: int  # decoded area and activations
    cache_floor: int  # least expert cache
    cache_all: int  # expert cache that holds every expert
    loading: int = 0  # held while loading only, besides base and dense

    @property
    def floor(self) -> int:
        """Least memory that works."""
        running = self.kv + self.scratch + self.cache_floor
        return self.base + self.dense + max(running, self.loading)


def base_bytes(rss: int) -> int:
    """Share of the process itself, of which `rss` is resident when loading begins."""
    return max(rss + RUNTIME_GROWTH_BYTES, LEAST_BASE_BYTES)


@dataclass(frozen=True)
class MemoryReport:
    """How the memory granted is shared out, in bytes. `total` is the sum of the shares."""

    promised: int
    base: int
    dense: int
    kv: int
    scratch: int
    cache: int

    @property
    def total(self) -> int:
        """What the process comes to at most."""
        return self.base + self.dense + self.kv + self.scratch + self.cache

    def as_dict(self) -> dict[str, int]:
        """Give the shares, `total` and `promised` for --json."""
        return {**asdict(self), "total": self.total}

    def __str__(self) -> str:
        parts = ("base", "dense", "kv", "scratch", "cache")
        shares = ", ".join(f"{part} {format_bytes(getattr(self, part))}" for part in parts)
        return f"memory {format_bytes(self.promised)}: {shares}"


def plan(needs: Needs, memory_bytes: int) -> MemoryReport:
    """Share out the memory: the expert cache takes what nothing else needs.

    Raises
    ------
    BudgetError
        The memory is below the floor.
    """
    floor = needs.floor
    if memory_bytes < floor:
        parts = [
            ("base", needs.base),
            ("dense weights", needs.dense),
            ("KV cache", needs.kv),
            ("scratch", needs.scratch),
            ("expert cache", needs.cache_floor),
        ]
        filled = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts)
        raise BudgetError(
            f"{format_bytes(memory_bytes)} of memory is below this model's floor of "
            f"{_round_up(floor)}, which is filled by {filled}; "
            "grant more with --memory or shorten --context",
            floor_bytes=floor,
        )
    rest = memory_bytes - needs.base - needs.dense - needs.kv - needs.scratch
    return MemoryReport(
        promised=memory_bytes,
        base=needs.base,
        dense=needs.dense,
        kv=needs.kv,
        scratch=needs.scratch,
        cache=min(rest, max(needs.cache_all, needs.cache_floor)),
    )


def _round_up(count: int) -> str:
    """Print the floor so that granting what is printed is enough."""
    return f"{-(-count // 1_000_000) / 1000:.3f} GB"
