"""Drives fail. What a retry cures is cured; any other fault reaches its caller, and only that."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from core_process import run_script
from synthetic_shards import make_shards

from zipmoe._errors import CorruptError, FetchError

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The library that makes pread fail on demand."""
    if COMPILER is None:
        # A wheel can be tested without one; what builds from source has it.
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("shim") / "faulty_pread.so"
    source = Path(__file__).with_name("faulty_pread.c")
    command = [COMPILER, "-shared", "-fPIC", "-O1", source, "-o", library, "-ldl"]
    subprocess.run(command, check=True)
    return str(library)


PREAD_FAULTS = """
import ctypes, errno
from pathlib import Path
import numpy as np
from synthetic_shards import make_shards
from zipmoe._errors import CorruptError, FetchError

shim = ctypes.CDLL(None)
ERROR, SHORT, FLIP = 1, 2, 3
folder, reader, codec = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
# Records of several requests: 3 x 1.5 MB, or 6 planes in two slots.
shards = make_shards(folder, layers=1, experts=4, shapes=((1000, 750),) * 3, codec=codec)
size = {"slots": 2} if codec == "raw" else {"tiers": (0, 0, 2, 0)}

def errors_of(cache):
    return cache.counters()["read_errors"]

# One EIO is retried and cured.
cache = shards.open(**size, reader=reader)
shim.plan_fault(ERROR, 1, errno.EIO)
shards.check_expert(cache, 0, 0)
assert errors_of(cache) == 1, errors_of(cache)

# EINTR and EAGAIN, many times, are no errors at all.
for number in (errno.EINTR, errno.EAGAIN):
    shim.plan_fault(ERROR, 500, number)
    shards.check_expert(cache, 0, 1 if number == errno.EINTR else 2)
    assert shim.faults_left() <= 0
assert errors_of(cache) == 1

# EIO for good, and errors that no retry cures: FetchError, and the cache goes on.
for number, expert in ((errno.EIO, 3), (errno.ENODEV, 0), (errno.EINTR, 1)):
    out = np.full((1000, 750), 77, np.uint16)
    shim.plan_fault(ERROR, 1 << 30, number)
    try:
        cache.decode(0, expert, 1, out)
    except FetchError as error:
        path, offset, length = shards.record(0, expert)
        assert error.path == path and error.errno == number, error
        assert offset <= error.offset < offset + length, error
        assert f"expert {expert} of layer 0" in str(error), error
    else:
        raise SystemExit("no error")
    assert (out == 77).all()
    shim.plan_fault(0, 0, 0)
    shards.check_expert(cache, 0, expert)

# An error of a prefetch surfaces where the expert is asked for, and once.
shim.plan_fault(ERROR, 1 << 30, errno.EIO)
cache.prefetch(0, [2])
try:
    cache.decode(0, 2, 0, np.zeros((1000, 750), np.uint16))
except FetchError:
    pass
else:
    raise SystemExit("no error")
shim.plan_fault(0, 0, 0)
shards.check_expert(cache, 0, 2)
cache.close()

# Short reads go on where they stopped.
for limit in (4096, 5000, 700_000) if reader == "pread" else (1, 1000, 4096, 700_000):
    cache = shards.open(**size, reader=reader)
    shim.plan_fault(SHORT, 3000, limit)
    shards.check_expert(cache, 0, 0)
    assert errors_of(cache) == 0
    cache.close()

# A bit that is wrong once costs a second read; wrong again, it is corruption.
cache = shards.open(**size, reader=reader)
shim.plan_fault(FLIP, 1, 0)
shards.check_expert(cache, 0, 0)
counters = cache.counters()
length = shards.record(0, 0)[2]
assert counters["read_errors"] == 1 and counters["bytes_read"] == 2 * length, counters
shim.plan_fault(FLIP, 1 << 30, 0)
try:
    cache.decode(0, 1, 0, np.zeros((1000, 750), np.uint16))
except CorruptError as error:
    assert (error.layer, error.expert, error.plane) == (0, 1, "sign-mantissa"), error
else:
    raise SystemExit("no error")
assert cache.counters()["bytes_read"] == 4 * length
shim.plan_fault(0, 0, 0)
shards.check_expert(cache, 0, 1)
cache.close()
print("done")
"""


@pytest.mark.parametrize("codec", ["raw", "rank223"])
@pytest.mark.parametrize("reader", ["pread", "pread+buffered"])
def test_pread_survives_every_fault_of_a_drive(shim, tmp_path, reader, codec):
    assert run_script(PREAD_FAULTS, tmp_path, reader, codec, preload=shim) == "done\n"


RANDOM_FAULTS = """
import ctypes
from pathlib import Path
import numpy as np
from synthetic_shards import make_shards
from zipmoe import _core

shim = ctypes.CDLL(None)
ERROR, SHORT, SLOW = 1, 2, 3
shards = make_shards(Path(sys.argv[1]), layers=2, experts=6)
policies = [name for name in _core.policies() if name not in ("static", "belady")]
reads = faults = 0
for seed, policy in enumerate(policies):
    for slots in (2, 5):
        cache = shards.open(slots=slots, reader=sys.argv[2], policy=policy, request_bytes=4096,
                            depth=4)
        rng = np.random.default_rng(seed)
        shim.plan_random(seed + 1, 10)
        for _ in range(40):
            layer, experts = int(rng.integers(2)), rng.permutation(6)[:3].tolist()
            cache.prefetch(layer, experts)
            cache.look_ahead(1 - layer, experts)
            for expert in experts:
                shards.check_expert(cache, layer, expert)
        shim.plan_fault(0, 0, 0)
        counters = cache.counters()
        cache.close()
        assert counters["read_errors"] <= shim.faults_of(ERROR)  # what is read ahead goes on
        reads += counters["bytes_read"] // 4096
        faults += sum(map(shim.faults_of, (ERROR, SHORT, SLOW)))
print(reads, faults)
"""


@pytest.mark.parametrize("reader", ["pread", "pread+buffered"])
def test_weights_are_right_when_one_read_in_a_hundred_goes_wrong(shim, tmp_path, reader):
    reads, faults = map(int, run_script(RANDOM_FAULTS, tmp_path, reader, preload=shim).split())
    assert reads > 5000
    assert 0.01 * reads < faults < 0.1 * reads


@contextlib.contextmanager
def replaced(path, other):
    """While inside, the descriptor that the cache holds of `path` is that of `other`."""
    held = [fd for fd in descriptors() if link_of(fd) == str(path)]
    assert len(held) == 1
    saved = os.dup(held[0])
    os.dup2(other, held[0])
    try:
        yield
    finally:
        os.dup2(saved, held[0])
        os.close(saved)


def descriptors():
    return [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]


def link_of(fd):
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:  # the one that listed the folder
        return ""


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path, layers=2, experts=4)


@pytest.mark.parametrize("prefetched", [False, True])
@pytest.mark.parametrize("reader", ["io_uring", "pread"])
def test_an_unreadable_place_is_a_fetch_error_and_the_rest_stays_usable(shards, reader, prefetched):
    cache = shards.open(reader=reader, slots=3)
    # Reading our own memory where nothing is mapped: EIO, from the kernel itself.
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    path, offset, _ = shards.record(0, 2)
    out = np.full_like(shards.weights[0, 2, 0], 9)
    with replaced(path, memory):
        if prefetched:
            cache.prefetch(0, [2])
        with pytest.raises(FetchError, match="expert 2 of layer 0") as error:
            cache.decode(0, 2, 0, out)
    os.close(memory)
    assert (error.value.path, error.value.offset, error.value.errno) == (path, offset, errno.EIO)
    assert (out == 9).all()
    assert cache.counters()["read_errors"] == 2  # the request and its retry
    for layer in (0, 1):
        for expert in range(4):
            shards.check_expert(cache, layer, expert)
    cache.close()


@pytest.mark.parametrize("plane", [0, 1])
@pytest.mark.parametrize("reader", ["io_uring", "pread"])
def test_a_plane_that_cannot_be_read_alone_leaves_the_other_where_it_is(shards, reader, plane):
    split = (0, 2, 0, 6) if plane == 0 else (0, 2, 6, 0)
    cache = shards.open(reader=reader, tiers=split, policy="lru")
    for expert in (2, 0, 1):  # leaves one plane of expert 2
        shards.check_expert(cache, 0, expert)
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    path = shards.record(0, 2)[0]
    with replaced(path, memory):
        for _ in range(3):
            with pytest.raises(FetchError, match="expert 2 of layer 0") as error:
                cache.decode(0, 2, 0, np.zeros_like(shards.weights[0, 2, 0]))
    os.close(memory)
    assert error.value.offset in {int(shards.row(0, 2, m)[10 + 3 * plane]) for m in (0, 1, 2)}
    before = cache.counters()["bytes_read"]
    shards.check_expert(cache, 0, 2)
    assert cache.counters()["bytes_read"] - before == shards.planes(0, 2)[plane]
    for expert in range(4):
        shards.check_expert(cache, 1, expert)
    cache.close()


@pytest.mark.parametrize("reader", ["io_uring", "pread"])
def test_a_file_truncated_while_open_is_corrupt(shards, reader):
    cache = shards.open(reader=reader, slots=2, policy="lru")
    path, offset, length = shards.record(0, 3)
    whole = Path(path).read_bytes()
    for size in (offset, offset + 1, offset + 4096, offset + length - 1, 0):
        os.truncate(path, size)
        with pytest.raises(CorruptError, match="truncated") as error:
            cache.decode(0, 3, 0, np.zeros_like(shards.weights[0, 3, 0]))
        found = error.value
        assert (found.file, found.layer, found.expert) == (path, 0, 3)
        assert offset <= found.offset < offset + length
        Path(path).write_bytes(whole)
        shards.check_expert(cache, 0, 3)
        for expert in (0, 1):
            shards.check_expert(cache, 1, expert)
    cache.close()


def waiting(call):
    """Runs the call in a thread; the list gets its error, or None."""
    results = []

    def run():
        try:
            call()
        except Exception as error:  # noqa: BLE001  handed to the test
            results.append(error)
        else:
            results.append(None)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


@pytest.mark.parametrize("reader", ["io_uring"])
def test_short_reads_of_the_ring_go_on_where_they_stopped(shards, reader):
    # A pipe gives what it has: at most 64 KiB at a time, here a page.
    cache = shards.open(reader=reader, slots=2)
    path, offset, length = shards.record(1, 0)
    record = Path(path).read_bytes()[offset : offset + length]
    source, sink = os.pipe()
    with replaced(path, source):
        thread, results = waiting(lambda: shards.check(cache, 1, 0, 2))
        for at in range(0, length, 4096):
            os.write(sink, record[at : at + 4096])
        thread.join(30)
    assert results == [None]
    assert cache.counters()["read_errors"] == 0
    os.close(source)
    os.close(sink)
    cache.close()


@pytest.mark.parametrize("reader", ["io_uring"])
def test_a_failed_read_reaches_everybody_who_waits_for_it(shards, reader):
    cache = shards.open(reader=reader, slots=2)
    path, _, _ = shards.record(1, 0)
    out = np.zeros_like(shards.weights[1, 0, 0])
    source, sink = os.pipe()
    with replaced(path, source):
        waiters = [waiting(lambda: cache.decode(1, 0, 0, out)) for _ in range(4)]
        while cache.counters()["hits"] + cache.counters()["misses"] < 1:
            pass
        shards.check_expert(cache, 0, 1)  # another shard is read meanwhile
        threading.Event().wait(0.2)
        os.close(sink)  # the end of the file
        for thread, _ in waiters:
            thread.join(30)
    assert [type(results[0]) for _, results in waiters] == [CorruptError] * 4
    os.close(source)
    shards.check_expert(cache, 1, 0)
    cache.close()


@pytest.mark.parametrize("reader", ["io_uring", "pread"])
def test_what_failed_for_one_request_is_read_again_for_the_next(shards, reader):
    cache = shards.open(reader=reader, slots=3)
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    with replaced(shards.record(0, 2)[0], memory):
        cache.prefetch(0, [2])
        while cache.counters()["read_errors"] < 2:
            pass
    os.close(memory)
    cache.begin_request()
    shards.check_expert(cache, 0, 2)  # nobody has asked for it in vain
    cache.close()


@pytest.mark.parametrize("reader", ["io_uring"])
def test_a_read_that_began_for_one_request_and_fails_in_the_next_is_tried_again(shards, reader):
    cache = shards.open(reader=reader, slots=2)
    source, sink = os.pipe()
    with replaced(shards.record(1, 0)[0], source):
        cache.prefetch(1, [0])
        threading.Event().wait(0.2)  # the drive has it
    cache.begin_request()
    cache.prefetch(1, [0])
    thread, results = waiting(lambda: shards.check(cache, 1, 0, 0))
    threading.Event().wait(0.2)
    os.close(sink)  # the end of the file
    thread.join(30)
    assert results == [None]
    os.close(source)
    cache.close()


@pytest.mark.parametrize("reader", ["io_uring"])
def test_close_wakes_those_who_wait(shards, reader):
    cache = shards.open(reader=reader, slots=2)
    path, _, _ = shards.record(1, 0)
    out = np.zeros_like(shards.weights[1, 0, 0])
    source, sink = os.pipe()
    with replaced(path, source):
        waiters = [waiting(lambda e=e: cache.decode(1, e, 0, out)) for e in (0, 0, 1, 2, 3)]
        threading.Event().wait(0.2)
        closer, closed = waiting(cache.close)
        for thread, results in waiters:  # before the read itself has ended
            thread.join(30)
            assert isinstance(results[0], ValueError)
            assert "closed" in str(results[0])
        os.close(sink)
        closer.join(30)
    assert closed == [None]
    os.close(source)


FORBIDDEN = """
import ctypes, errno, struct
from pathlib import Path
from synthetic_shards import make_shards
from zipmoe import _core

# What containers do: a seccomp filter that answers io_uring_setup (425) with EPERM or ENOSYS.
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ERRNO, ALLOW = 0x00050000, 0x7FFF0000
number = getattr(errno, sys.argv[2])
steps = [(LOAD_WORD, 0, 0, 0), (JUMP_IF_EQUAL, 0, 1, 425), (RETURN, 0, 0, ERRNO | number),
         (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(
    struct.pack("@HP", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
assert libc.prctl(no_new_privileges, 1, 0, 0, 0) == 0
assert libc.prctl(set_seccomp, filter_mode, program, 0, 0) == 0

shards = make_shards(Path(sys.argv[1]), layers=1, experts=3)
cache = shards.open(slots=2)
assert cache.reader.startswith("pread"), cache.reader
for expert in (0, 1, 2):
    shards.check_expert(cache, 0, expert)
cache.close()
try:
    _core.ExpertCache(shards.paths, shards.table, capacity_bytes=1 << 30, reader="io_uring")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS"])
def test_where_the_system_forbids_rings_pread_takes_over(tmp_path, answer):
    assert "io_uring does not work here" in run_script(FORBIDDEN, tmp_path, answer)
