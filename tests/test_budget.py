"""Memory: amounts as people write them, limits as Linux says them, shares that add up."""

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zipmoe import BudgetError
from zipmoe.budget import (
    Activations,
    Needs,
    available_memory,
    format_bytes,
    parse_memory,
    peak_rss_bytes,
    plan,
    rss_bytes,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2GB", 2 * 10**9),
        ("2gb", 2 * 10**9),
        ("2g", 2 * 10**9),
        ("2GiB", 2 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("512MB", 512 * 10**6),
        ("64kib", 65536),
        ("1TB", 10**12),
        ("123456", 123456),
        (123456, 123456),
    ],
)
def test_amounts_of_memory_are_read_as_people_write_them(text, count):
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2XB", "2 GB of it", "1e9", "nan", True])
def test_other_texts_are_no_amount_of_memory(text):
    with pytest.raises(ValueError, match=r"amount of memory"):
        parse_memory(text)


@given(st.integers(1, 10**14))
def test_what_is_printed_can_be_read_again(count):
    assert parse_memory(format_bytes(count).replace(" bytes", "")) == pytest.approx(count, rel=0.01)


SIZES = st.integers(0, 10**11)


@given(st.builds(Needs, SIZES, SIZES, SIZES, SIZES, SIZES, SIZES, SIZES), st.integers(1, 10**12))
def test_shares_never_exceed_the_memory_and_the_floor_is_exact(needs, memory):
    if memory < needs.floor:
        with pytest.raises(BudgetError) as caught:
            plan(needs, memory)
        assert caught.value.floor_bytes == needs.floor
        return
    report = plan(needs, memory)
    assert report.total <= report.promised == memory
    assert report.cache >= needs.cache_floor
    assert plan(needs, needs.floor).total <= needs.floor


def test_a_refusal_is_one_sentence_with_the_floor_and_what_fills_it():
    needs = Needs(
        base=5 * 10**8, dense=10**8, kv=10**7, scratch=10**7, cache_floor=10**6, cache_all=10**9
    )
    with pytest.raises(BudgetError) as caught:
        plan(needs, 10**8)
    text = str(caught.value)
    for word in (
        "floor",
        "0.621 GB",
        "base 500.00 MB",
        "dense",
        "KV cache",
        "scratch",
        "expert cache",
    ):
        assert word in text
    assert "\n" not in text
    assert not re.search(r"\. [A-Z]", text)
    printed = re.search(r"floor of ([0-9.]+ GB)", text)[1]
    assert plan(needs, parse_memory(printed)).total <= parse_memory(printed)


def test_the_cache_takes_the_rest_but_no_more_than_all_experts():
    needs = Needs(base=100, dense=50, kv=10, scratch=10, cache_floor=5, cache_all=80)
    assert plan(needs, 200).cache == 30
    assert plan(needs, 10**6).cache == 80


def test_activations_grow_with_the_prompt_and_with_each_width():
    small = Activations(
        hidden=64, widest=128, top_k=2, expert_width=96, vocabulary=1000, element_bytes=2
    )
    assert small.growth.at(10) < small.growth.at(11)
    eager = Activations(**{**vars(small), "quadratic_heads": 4})
    assert eager.growth.at(1000) - small.growth.at(1000) == 1000 * 1000 * 4 * 12


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal: 99999999 kB\nMemAvailable: 50000000 kB\n"}


def test_without_a_limit_the_machine_says_what_is_available(tmp_path):
    write(tmp_path, MEMINFO | {"proc/self/cgroup": "0::/\n"})
    found = available_memory(tmp_path)
    assert found.limited_by == "machine"
    assert abs(found.bytes - 50000000 * 1024 - rss_bytes()) < 10**8
    assert found.budget < found.bytes


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_cgroup_above_the_process_counts_less_what_others_hold(version, tmp_path):
    limit, used, cache = 4 * 10**9, 3 * 10**9, 10**9
    if version == 2:
        write(tmp_path, {"proc/self/cgroup": "0::/a/b\n"})
        names, stat, base = ("memory.max", "memory.current"), "inactive_file", "sys/fs/cgroup"
        write(tmp_path, {f"{base}/a/b/memory.max": "max\n"})
    else:
        write(tmp_path, {"proc/self/cgroup": "7:cpu:/x\n5:memory:/a/b\n"})
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        stat, base = "total_inactive_file", "sys/fs/cgroup/memory"
        write(tmp_path, {f"{base}/{names[0]}": str(2**63 - 4096)})
    write(
        tmp_path,
        MEMINFO
        | {
            f"{base}/a/{names[0]}": f"{limit}\n",
            f"{base}/a/{names[1]}": f"{used}\n",
            f"{base}/a/memory.stat": f"anon 5\n{stat} {cache}\nother 7\n",
        },
    )
    found = available_memory(tmp_path)
    assert found.limited_by == "cgroup"
    assert abs(found.bytes - (limit - (used - cache) + rss_bytes())) < 10**8


def test_this_process_knows_its_own_memory():
    assert 10**6 < rss_bytes() <= peak_rss_bytes()
    assert available_memory().bytes > 0


def test_a_process_is_not_charged_with_the_memory_of_the_one_that_started_it():
    ballast = bytearray(300_000_000)
    for at in range(0, len(ballast), 4096):
        ballast[at] = 1
    code = "from zipmoe._process import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < len(ballast)
