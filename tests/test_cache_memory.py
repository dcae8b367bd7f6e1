"""The cache stays inside its capacity, and leaves nothing in the page cache."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
from pathlib import Path

import pytest
from core_process import run_script, unless_sanitized
from synthetic_shards import make_shards

READERS = ["io_uring", "io_uring+buffered", "pread", "pread+buffered"]
MIB = 1 << 20

GROWTH = """
import json
from pathlib import Path
import numpy as np
from synthetic_shards import make_shards
from zipmoe import _core

def resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024

folder, reader, capacity, codec = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
shape = (512, 768)
shards = make_shards(folder, layers=1, experts=40, shapes=(shape,) * 2, codec=codec)
reader_of = lambda: _core.ExpertCache(
    shards.paths, shards.table, capacity_bytes=capacity, reader=reader)
reader_of().close()  # what is paid once: code, the heap
out = np.ones(shape, np.uint16)
before = resident()
cache = reader_of()
empty = resident() - before
peak = 0
for expert in [*range(40), *range(0, 40, 3)]:
    cache.prefetch(0, [expert, (expert + 1) % 40])
    for matrix in (0, 1):
        cache.decode(0, expert, matrix, out)
        assert (out == shards.weights[0, expert, matrix]).all()
    peak = max(peak, resident() - before)
print(json.dumps(dict(
    empty=empty, peak=peak, allocated=cache.allocated_bytes, slots=cache.slots,
    record=shards.record_bytes(), after=(cache.close(), resident() - before)[1])))
"""


@unless_sanitized
@pytest.mark.parametrize("codec", ["raw", "rank223", "zstd"])
@pytest.mark.parametrize("reader", ["io_uring", "pread"])
def test_resident_memory_grows_by_no_more_than_the_capacity(tmp_path, reader, codec):
    make_shards(tmp_path, layers=1, experts=2).open(reader=reader).close()  # may skip
    capacity = 20 * MIB
    told = json.loads(run_script(GROWTH, tmp_path, reader, capacity, codec))
    assert 8 < told["slots"] < 30
    assert told["allocated"] <= capacity
    assert told["slots"] * told["record"] < told["peak"] <= capacity
    # All of it at once: no read waits for a page. (Kernels before 5.14 give pages one by one.)
    is_touched = tuple(map(int, platform.release().split(".")[:2])) >= (5, 14)
    assert (told["empty"] >= told["slots"] * told["record"]) == is_touched
    assert told["after"] < 2 * MIB


def cached_pages(path):
    """How many pages of the file the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        view = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    pin = ctypes.c_char.from_buffer(view)
    assert libc.mincore(ctypes.addressof(pin), size, pages) == 0
    del pin
    view.close()
    return sum(page & 1 for page in pages.raw)


def drop_from_page_cache(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize("reader", READERS)
def test_reading_leaves_nothing_in_the_page_cache(tmp_path, reader):
    shards = make_shards(tmp_path, layers=1, experts=8, shapes=((1000, 700),) * 2)
    path = shards.paths[0]
    drop_from_page_cache(path)
    if cached_pages(path) > 0:
        # tmpfs: what was read is there whoever read it.
        pytest.skip("this filesystem keeps its pages in memory")
    cache = shards.open(slots=3, reader=reader)
    for expert in range(8):
        shards.check_expert(cache, 0, expert)
    cache.close()
    # The probe for direct reads touches one page before its own close.
    assert cached_pages(path) < 16
    assert shards.record_bytes() > MIB
