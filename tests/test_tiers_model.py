"""Tiers as a user asks for them: the same tokens from every split, inside the memory promised."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from small_store import write_store
from typer.testing import CliRunner

import zipmoe
from zipmoe import BudgetError, ZipmoeError, _core
from zipmoe.budget import MemoryReport
from zipmoe.cli import app
from zipmoe.store import open_store
from zipmoe.tiers import counts, parse_tiers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SPLITS = [
    "0,40%,60%,0",
    "0,20%,0,80%",
    "0,0,100%,0",
    "60%,30%,10%,0",
    "3,4,0,0",
    "4,0,4,4",
    "100%,0,0,0",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's threads wait by spinning, for longer than these models compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiers")


@pytest.fixture(scope="module", params=["rank223", "rank4", "zstd", "lz4hc"])
def store(request: pytest.FixtureRequest, folder: Path) -> Path:
    return packed(folder, request.param)


def packed(folder: Path, codec: str) -> Path:
    if not (folder / "checkpoint").exists():
        write_store(folder, hidden=128, inner=192)  # smaller matrices would be stored raw
    store = folder / codec
    if not store.exists():
        zipmoe.pack_checkpoint(folder / "checkpoint", store, codec=codec)
    return store


@torch.no_grad()
def generated(loaded: zipmoe.Loaded) -> list[int]:
    ids = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(4))
    out = loaded.model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    return [int(token) for token in out[0]]


@pytest.mark.parametrize("compute", ["native", "torch"])
def test_the_same_tokens_come_out_with_every_split(store: Path, compute: str) -> None:
    with open_store(store) as opened:
        paths, table = opened.expert_table()
    room = _core.ExpertCache.needed_bytes(table, (0, 11, 0, 0))  # of 16
    report = MemoryReport(room, 0, 0, 0, 0, room)
    with zipmoe.load(store, memory="64GB", context=64, compute=compute) as loaded:
        assert loaded.runtime.engaged()["tiers"] == "16 compressed"
        expected = generated(loaded)
        for split in SPLITS:
            loaded.runtime.source.cache.close()
            cache = loaded.runtime.source.cache = _core.ExpertCache(
                paths, table, capacity_bytes=room, tiers=counts(parse_tiers(split), table, report)
            )
            assert generated(loaded) == expected, split
            counters = cache.counters()
            full, _, first, second = cache.tiers
            assert (counters["full_hits"] > 0) == (full > 0)
            assert (counters["sign_mantissa_hits"] > 0) == (first > 0)
            assert (counters["exponent_hits"] > 0) == (second > 0)


def expert_table(store: Path) -> Any:
    with open_store(store) as opened:
        return opened.expert_table()[1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1,2,3",
        "1,2,3,4,5",
        "a,0,0,0",
        "0,0,0,0",
        "-1,2,0,0",
        "60%,60%,0,0",
        "0,1.5,0,0",
        "0,%,0,0",
    ],
)
def test_what_says_nothing_of_tiers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tiers"):
        parse_tiers(text)
    assert CliRunner().invoke(app, ["chat", "store", "--tiers", text]).exit_code == 2


def test_shares_are_of_the_memory_and_fit_it(folder: Path) -> None:
    table = expert_table(packed(folder, "zstd"))
    base, *sizes = _core.ExpertCache.tier_bytes(table)
    for memory in range(base + 2 * sizes[1], base + 16 * sum(sizes), 37_000):
        report = MemoryReport(memory, 0, 0, 0, 0, memory)
        for split in ("25%,25%,25%,25%", "100%,0,0,0", "0,100%,0,0", "0,0,100%,0", "0,0,0,100%"):
            found = counts(parse_tiers(split), table, report)
            assert _core.ExpertCache.needed_bytes(table, found) <= memory
    assert counts((0, 0.5, 0.5, 0), table, report)[1:3] == (
        int((memory - base - 2 * sizes[1]) / 2 / sizes[1]),
        int((memory - base - 2 * sizes[1]) / 2 / sizes[2]),
    )


def test_tiers_beyond_the_memory_are_refused_with_what_would_do(folder: Path) -> None:
    store = packed(folder, "rank223")
    table = expert_table(store)
    needed = _core.ExpertCache.needed_bytes(table, (16, 16, 0, 0))
    with pytest.raises(BudgetError, match="16 full, 16 compressed experts need") as caught:
        counts((16, 16, 0, 0), table, MemoryReport(9_000_000, 0, 0, 0, 0, needed - 1))
    assert caught.value.floor_bytes == 9_000_001
    with zipmoe.load(store, memory="64GB", context=64, tiers="16,16,0,0") as loaded:
        assert loaded.runtime.cache.tiers == [16, 16, 0, 0]
        assert loaded.runtime.cache.allocated_bytes == needed <= loaded.memory.cache


def test_raw_experts_have_no_other_tier(folder: Path) -> None:
    store = packed(folder, "raw")
    with pytest.raises(ZipmoeError, match="one plane"):
        zipmoe.load(store, memory="64GB", context=64, tiers="0,2,2,0")


def test_the_command_takes_tiers_and_says_what_they_found(folder: Path) -> None:
    store = packed(folder, "zstd")
    words = ["--prompt", "ab", "--max-tokens", "6", "--context", "64", "--json"]
    documents = [
        json.loads(CliRunner().invoke(app, ["generate", str(store), *words, *more]).stdout)
        for more in ([], ["--tiers", "2,2,12,0"])
    ]
    assert documents[0]["token_ids"] == documents[1]["token_ids"]
    assert documents[1]["engaged"]["tiers"] == "2 full, 2 compressed, 12 sign-mantissa"
    assert documents[1]["cache"]["full_hits"] > 0
    assert documents[1]["cache"]["sign_mantissa_hits"] > 0
