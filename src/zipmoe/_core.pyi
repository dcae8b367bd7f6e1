"""Contract of the native core.

Arrays are numpy; the GIL is released in every call that works on data.
"""

import enum
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

def available_isas() -> list[str]:
    """Name the instruction sets of this machine, best first.

    Some of "avx512bf16" (for products: codecs do as with "avx512"), "avx512", "avx2", "portable".
    """

def geometry(rows: int, columns: int) -> tuple[int, int]:
    """(row group, k-tile) that zipmoe chooses for a matrix (docs/format.md section 5)."""

def rank_layout(
    codec: str, rows: int, columns: int, *, row_group: int, k_tile: int
) -> tuple[int, int, int, int, int]:
    """(code bits, bytes of a table, where tables, offsets and variable part begin) of extent 1.

    Of a rank codec: docs/format.md section 7.2.
    """

def xxh3(data: Any) -> int:
    """XXH3 64 of a contiguous buffer."""

class Encoded:
    """A coded matrix. Arrays have their exact lengths, without padding to 4096."""

    @property
    def codec(self) -> str:
        """What it was coded with: the codec asked for, or "raw" if that takes less space."""
    @property
    def row_group(self) -> int: ...
    @property
    def k_tile(self) -> int: ...
    @property
    def extents(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]: ...

def encode(
    codec: str,
    weights: NDArray[np.uint16],
    *,
    row_group: int = 0,
    k_tile: int = 0,
    shards: int = 3,
    threads: int = 1,
    isa: str = "",
    allow_raw: bool = True,
    scale_group: int = 64,
) -> Encoded:
    """Encode a BF16 matrix [rows, columns] given as its bits; any strides (transposed is fine).

    row_group and k_tile 0: as `geometry`. isa "": the best. allow_raw False: never fall back to
    raw. scale_group: weights of a row that share a scale (int8, int4, int2, which are lossy and
    never fall back): 64, or 0 for the whole row. ValueError for options that the format does not
    know, and for infinities and NaN where they have no code.
    """

def decode(
    codec: str,
    extents: tuple[NDArray[np.uint8], NDArray[np.uint8]],
    out: NDArray[np.uint16],
    *,
    row_group: int,
    k_tile: int,
    threads: int = 1,
    isa: str = "",
) -> None:
    """Decode into `out` [rows, columns]: rows may be strided, columns must be contiguous.

    Raises CorruptError where the bytes are not a valid coding of such a matrix; never reads or
    writes out of bounds, whatever the bytes.
    """

def measure_reads(
    path: str, *, reader: str, request_bytes: int, depth: int, record_bytes: int, seconds: float
) -> float:
    """Bytes a second of records read from anywhere in a file, a few of them under way.

    reader: as for `ExpertCache`; request_bytes (a multiple of 4096), depth: requests and how many
    at once. Raises FetchError where a read fails, ValueError for a reader that does not work here
    and for a file shorter than a record.
    """

class ExpertCache:
    """Expert records kept compressed in memory: read on demand, verified.

    `paths`: the expert shards. `matrices`: u64 [n, 16], one row per matrix, rows of one expert
    together in order of use: layer, expert, matrix, shard (ordinal in paths), codec id, bytes per
    element, rows, columns, row group, k-tile, then offset, length, xxh3 of extent 0 and of extent 1
    (as in the store's index). An expert's extents lie in one run of its shard, as docs/format.md
    section 3 says.

    Raises FetchError (path, offset, errno) where a read fails, CorruptError (file, layer, expert,
    plane, offset) where the bytes are not those promised; it stays usable after either.
    """

    def __init__(
        self,
        paths: Sequence[str],
        matrices: NDArray[np.uint64],
        *,
        capacity_bytes: int,
        limit_bytes: int = 0,
        reader: str = "",
        isa: str = "",
        policy: str = "",
        request_bytes: int = 0,
        depth: int = 0,
        tiers: Sequence[int] | None = None,
    ) -> None:
        """capacity_bytes: most that it may allocate. reader "": io_uring if it works, else pread.

        limit_bytes: see `limit`, to begin with; 0: the capacity. So much is touched at once.
        policy: which expert goes when a slot is needed, one of `policies()` that need not be told
        anything beforehand; "": "request".
        request_bytes, depth: requests to the drive and how many at once; 0: what is good on most.
        tiers: how many experts it holds decoded, compressed, as sign-mantissas alone and as
        exponents alone; None: as many compressed as fit. Those being used count as compressed, two
        at least; where both planes are to be held alone, their common part is held as whole
        experts.
        "io_uring" and "pread" insist on one; "+direct" or "+buffered" after it on how files are
        read. Raises BudgetError below `floor_bytes` and where the tiers do not fit, ValueError for
        names that are unknown or do not work here, and for tiers that the codec does not have. A
        process must not fork while it holds a cache: the child's calls raise
        ValueError.
        """

    @property
    def reader(self) -> str:
        """What reads: "io_uring+direct", "io_uring", "pread+direct" or "pread"."""
    @property
    def isa(self) -> str: ...
    @property
    def policy(self) -> str: ...
    @property
    def slots(self) -> int:
        """How many experts it can hold decoded or compressed."""
    @property
    def tiers(self) -> list[int]:
        """How many it holds decoded, compressed, as sign-mantissas and as exponents, at most."""
    @property
    def allocated_bytes(self) -> int:
        """What it may come to now; 0 once closed."""
    @property
    def held(self) -> list[int]:
        """Experts there or on their way: full, compressed, sign-mantissa, exponents, absent."""
    @property
    def filled_bytes(self) -> int:
        """Memory that its slots have really taken so far."""
    @staticmethod
    def floor_bytes(matrices: NDArray[np.uint64]) -> int:
        """Least capacity_bytes that works for these matrices."""
    @staticmethod
    def needed_bytes(matrices: NDArray[np.uint64], tiers: Sequence[int]) -> int:
        """Least capacity_bytes for these tiers."""
    @staticmethod
    def tier_bytes(matrices: NDArray[np.uint64]) -> list[int]:
        """Bytes of a cache without a slot, then of an expert in each of the four tiers."""
    def begin_request(self, share: float = 1.0) -> None:
        """Tell the policy that a request begins, which will have this part of the tokens to come.

        1: it runs alone.
        """
    def prefetch(
        self,
        layer: int,
        experts: Sequence[int],
        tokens: Sequence[int] = ...,
        num_tokens: int = 1,
    ) -> None:
        """Start reading those that are absent, as far as slots allow; does not wait.

        tokens: how many of the pass's `num_tokens` chose each; empty: one each.

        The others follow in the background as slots become free. What goes wrong surfaces at
        `decode` of that expert. A later list replaces this one.
        """
    def look_ahead(self, layer: int, experts: Sequence[int]) -> None:
        """Read these while the drive would be idle; forgotten at the next `prefetch`."""
    def limit(self, most: int) -> int:
        """Take no more than `most` bytes from now on; returns what it will come to.

        At least `floor_bytes` and at most capacity_bytes. Experts that have no place any more are
        dropped, the least worthy first, and their memory goes back to the system: at once, or as
        soon as nobody uses them. No result depends on it.
        """
    def decode(self, layer: int, expert: int, matrix: int, out: NDArray[Any]) -> None:
        """Decode one matrix into `out` [rows, columns] of its element size (rows may be strided).

        Waits for the read if need be. Nothing is written to `out` from unverified bytes.
        """
    def counters(self) -> dict[str, int]:
        """hits, misses, bytes_read, evictions, read_errors, wait_ns, decode_ns since the start.

        full_hits counts those hits that found a decoded expert; sign_mantissa_hits and
        exponent_hits those misses that found one plane and read the other. evictions: experts
        dropped for others; demotions: those of which a plane was kept. promotions: experts that
        were decoded to stay so.

        ahead_reads counts experts that were read because `look_ahead` named them, ahead_used those
        of them that were visited before they were dropped, ahead_wasted those that were not. The
        rest are still there.

        Hits and misses count visits: one begins when `prefetch` lists an expert or, if it has not,
        when a matrix of it is decoded; it ends with the expert's last matrix. A hit found the
        record in memory or its read under way. read_errors counts those that a retry cured too.
        wait_ns and decode_ns are sums over calling threads.
        """
    def close(self) -> None:
        """Free threads, files and memory. Idempotent. Any later call raises ValueError."""

def policies() -> list[str]:
    """Name the replacement policies: first the default, last those that are told something."""

def replay(
    experts: NDArray[np.uint32],
    tokens: NDArray[np.uint32],
    begins: NDArray[np.float64],
    *,
    num_experts: int,
    policy: str,
    slots: int,
    popularity: NDArray[np.float64],
) -> dict[str, Any]:
    """Run recorded routing through a policy as the cache would if every read were over at once.

    experts [tokens, layers, k], pass after pass; tokens [passes]; begins [passes]: what part of a
    pass's requests begins with it. popularity [layers * experts]: for the policy "static", else
    empty. "belady" is told the future by the routing itself.

    Gives hits and misses [passes, layers], and evictions.
    """

class Gate(enum.Enum):
    """The activation between the products of a gated block."""

    silu = 0
    gelu = 1
    gelu_tanh = 2
    relu = 3
    relu2 = 4

class PackedMatrix:
    """A BF16 matrix as it lies in memory, ready to multiply. Holds the arrays that it lies in."""

    codec: str
    rows: int
    columns: int
    nbytes: int

    def __init__(
        self,
        codec: str,
        extents: tuple[NDArray[np.uint8], NDArray[np.uint8]],
        *,
        rows: int,
        columns: int,
        row_group: int,
        k_tile: int,
    ) -> None:
        """Raise CorruptError where the extents are no such matrix, ValueError for zstd, lz4hc."""

    def decode(self, out: int) -> None:
        """Decode all of it to [rows, columns] at the address `out`."""

class UrgentBlock:
    """See `Engine.urgent`. Entered once."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...

class Engine:
    """Products and whole layers from packed weights. One call at a time; others wait.

    A call under way is suspended while another thread is urgent: after the group of experts that it
    is at, or after attention. No bit depends on that.

    Tensors come as addresses of BF16 data with the elements from one column to the next, and the
    number of columns (tokens): whoever calls has checked dtypes, shapes and contiguity.
    """

    isa: str
    threads: int

    def __init__(self, *, threads: int = 0, isa: str = "") -> None:
        """Threads = 0: the pool that the process shares, one for each core."""

    def counters(self) -> dict[str, int]:
        """Count calls, and busy_ns: in calls, waiting for reads included, for other calls not.

        groups: how often experts were multiplied, one or several together; suspensions: how often
        a call under way let urgent ones pass.
        """

    def urgent(self) -> UrgentBlock:
        """Let what this thread does in a `with` block go before what others do.

        Its calls wait for the end of at most one group of experts, or of attention. Others wait
        until the block ends, between two calls or within one; one that waited during a block goes
        on by at least a group before the calls of the next. The thread must not wait for others
        inside the block.
        """

    def record_routing(self, is_on: bool) -> None:
        """Note what the routers of MoE blocks choose from now on, or stop to."""

    def take_routing(self) -> list[tuple[int, int, list[int]]]:
        """Take what was noted since the last time: of each call, layer, k and choices, by token."""

    def read(self, data: NDArray[np.uint8]) -> int:
        """Read memory at full speed; returns the exclusive or of its words."""

    def multiply(
        self,
        matrix: PackedMatrix,
        x: int,
        x_stride: int,
        count: int,
        bias: int,
        out: int,
        out_stride: int,
    ) -> None:
        """Multiply [count, columns] with it, to [count, rows]; `bias` is 0 or an address."""

    def multiply_wide(
        self,
        matrix: PackedMatrix,
        x: int,
        x_stride: int,
        count: int,
        out: int,
        out_stride: int,
    ) -> None:
        """Multiply [count, columns] with it, to [count, rows] in FP32."""

    def gated(
        self,
        gate: PackedMatrix,
        up: PackedMatrix,
        down: PackedMatrix,
        kind: Gate,
        x: int,
        x_stride: int,
        count: int,
        out: int,
        out_stride: int,
    ) -> None:
        """Run down(activation(gate x) * up x), rounded once between the products."""

    def decode_rows(
        self, matrix: PackedMatrix, rows: int, count: int, out: int, out_stride: int
    ) -> None:
        """Decode the rows whose int64 numbers are at `rows`."""

    def experts(
        self,
        cache: ExpertCache,
        layer: int,
        experts: int,
        weights: int,
        k: int,
        num_experts: int,
        kind: Gate,
        x: int,
        x_stride: int,
        count: int,
        out: int,
        out_stride: int,
    ) -> None:
        """Run the routed experts of a layer.

        `experts` [count, k] int64, numbers from num_experts on count nothing; `weights` [count, k]
        float32. Each token's experts are summed in ascending order of their numbers.
        """

    def multiply_expert(
        self,
        cache: ExpertCache,
        layer: int,
        expert: int,
        matrix: int,
        x: int,
        x_stride: int,
        count: int,
        out: int,
        out_stride: int,
    ) -> None:
        """Multiply with one matrix of one expert, to BF16."""

def set_num_threads(threads: int) -> None:
    """Set how many threads the shared pool has from the next Engine on; 0: one for each core."""

class Attention:
    """Attention of BF16 queries over BF16 keys and values, one fixed order for each query row.

    No bit depends on threads, batch, padding, other rows, or on how a prompt is cut; instruction
    sets may differ from each other (`csrc/attention_kernels.h`). One call at a time.
    """

    def __init__(self, *, threads: int = 0, isa: str = "") -> None:
        """Take the pool that the process shares (threads 0), or one of its own.

        isa "": the best.
        """

    @property
    def isa(self) -> str: ...
    def run(
        self,
        shape: tuple[int, int, int, int, int],
        widths: tuple[int, int],
        queries: tuple[int, tuple[int, int, int]],
        keys: tuple[int, tuple[int, int, int]],
        values: tuple[int, tuple[int, int, int]],
        out: tuple[int, tuple[int, int, int]],
        *,
        scaling: float,
        softcap: float = 0.0,
        causal: bool = False,
        offset: int = 0,
        window: int = 0,
        mask: tuple[int, tuple[int, ...], str] | None = None,
        bias: tuple[int, tuple[int, ...], str] | None = None,
        sinks: tuple[int, tuple[int, ...]] | None = None,
    ) -> None:
        """Attend. Nothing is checked but that the heads fit.

        Tensors: addresses with strides (elements) of batch, head and row, the last dimension being
        contiguous.
        shape: batch, heads, key heads, queries, keys; widths: of a key, of a value. causal: query t
        sees keys up to t + offset, and of those the last `window` if it is not 0. mask: address,
        strides of batch, head, query and key, "bool" (which keys are allowed), "bfloat16" or
        "float32" (added to the scores; the lowest finite number: not allowed); bias: the same, not
        "bool", added only. sinks: FP32, strides of batch, head and query. Queries without a key
        give 0.
        """

class NormKind:
    """What becomes of x, a row divided by its root mean square."""

    plain: NormKind
    """round(x)"""
    rounded: NormKind
    """round(weight * round(x))"""
    wide: NormKind
    """round(weight * x)"""
    wide_plus1: NormKind
    """round((1 + weight) * x)"""

def rms_norm(
    x: int,
    rows: int,
    width: int,
    weight: int,
    weight_is_wide: bool,
    out: int,
    *,
    kind: NormKind,
    eps: float,
    isa: str = "",
) -> None:
    """Normalise BF16 rows that lie one after the other; all but numbers are addresses.

    weight: BF16 or FP32 (wide), 0 for the plain kind. Bits are the same on every instruction set.
    """

# What attention must know of new tokens: batch, queries; cos, sin, strides of batch, head (0) and
# token, and how many words of a head they turn; the address of int64 [batch, 7], of each sequence's
# cache: addresses of keys and values, strides of head and token of keys, and of values, and how
# many tokens there are with the new ones; causal and mask as in `Attention.run`.
_Step: TypeAlias = tuple[Any, ...]
_Norm: TypeAlias = tuple[NormKind, float, int, int, bool]
# A gated block that all tokens visit: gate, up and down, and the activation.
_Dense: TypeAlias = tuple[PackedMatrix, PackedMatrix, PackedMatrix, Gate]

class AttentionBlock:
    """Self-attention with rotary position embeddings, run in one call.

    query, key, value, output: a matrix, and the address of its bias (BF16; 0: none). query_norm,
    key_norm: kind, eps, width (of a head, or of all together), address of the weight, whether that
    is FP32. Raises ValueError for parts that do not fit. Matrices are kept alive, addresses are
    not.
    """

    def __init__(
        self,
        *,
        query: tuple[PackedMatrix, int],
        key: tuple[PackedMatrix, int],
        value: tuple[PackedMatrix, int],
        output: tuple[PackedMatrix, int],
        heads: int,
        kv_heads: int,
        width: int,
        scaling: float,
        query_norm: _Norm | None = None,
        key_norm: _Norm | None = None,
    ) -> None: ...
    def run(self, engine: Engine, x: int, out: int, step: _Step) -> None:
        """Attend to what the cache holds and to the new tokens, which are written into it.

        x, out: BF16 [batch, queries, .] without gaps.
        """

class RouterScore:
    """What a router makes of its logits."""

    softmax: RouterScore
    sigmoid: RouterScore

class GroupScore:
    """What a group of experts is worth: its best, or its two best added."""

    best: GroupScore
    two_best: GroupScore

class RouterRule:
    """Which experts a token goes to, in FP32 throughout.

    The k best scores plus `correction` (address, FP32, 0: none) in the best groups; weights are
    their scores, divided by their sum plus `least_sum` if `normalises`, times `scaling`.
    """

    def __init__(
        self,
        num_experts: int,
        k: int,
        *,
        score: RouterScore,
        normalises: bool = False,
        least_sum: float = 0.0,
        scaling: float = 1.0,
        correction: int = 0,
        num_groups: int = 1,
        kept_groups: int = 1,
        group_score: GroupScore = ...,
    ) -> None: ...
    def choose(self, logits: int, tokens: int, experts: int, weights: int) -> None:
        """From FP32 logits [tokens, num_experts]: int64 and FP32 [tokens, k], the best first."""

class MoeBlock:
    """Router, routed experts and an expert that all tokens visit, run in one call.

    shared_gate: one row, whose product's sigmoid weighs what `shared` gives.
    """

    def __init__(
        self,
        *,
        router: PackedMatrix,
        rule: RouterRule,
        gate: Gate,
        shared: _Dense | None = None,
        shared_gate: PackedMatrix | None = None,
    ) -> None: ...
    def run(
        self, engine: Engine, cache: ExpertCache, layer: int, x: int, tokens: int, out: int
    ) -> None:
        """BF16 x, out [tokens, hidden] without gaps; the sum over experts is rounded once."""

class DecoderLayer:
    """x + attention(norm(x)), then the same with experts or a dense block, run in one call."""

    def __init__(
        self,
        *,
        attention: AttentionBlock,
        mlp: MoeBlock | _Dense,
        before_attention: _Norm,
        before_mlp: _Norm,
    ) -> None: ...
    def followed_by(self, layer: DecoderLayer, number: int) -> None:
        """Let it ask the next layer's router beforehand; number: of the experts of that layer.

        layer: one that has experts.
        """

    def run(
        self, engine: Engine, cache: ExpertCache, number: int, x: int, out: int, step: _Step
    ) -> None:
        """BF16 x and out [batch, queries, hidden], without gaps, not the same memory."""

class DecoderLayers:
    """Layers one after the other, run in one call. layers: with the numbers of their experts."""

    def __init__(self, layers: list[tuple[DecoderLayer, int]]) -> None: ...
    def run(
        self, engine: Engine, cache: ExpertCache, x: int, out: int, step: _Step, others: list[int]
    ) -> None:
        """As `DecoderLayer.run`; others: descriptions of the caches of layers after the first."""
