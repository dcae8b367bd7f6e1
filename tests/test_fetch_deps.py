"""Sources for machines without root: only archives with the pinned hash are used."""

import hashlib
import io
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import fetch_deps


@pytest.fixture
def archives(monkeypatch, tmp_path):
    """Stands for pip: every archive holds its files with their own names as text."""
    pinned = {}

    def make(requirement, inner, names):
        name, _, version = requirement.partition("==")
        path = tmp_path / f"{name}-{version}.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for member in names:
                info = tarfile.TarInfo(f"{name}-{version}/{inner}/{member}")
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member.encode()))
        return path

    paths = {}
    for requirement, (_, inner, names) in fetch_deps.ARCHIVES.items():
        paths[requirement] = make(requirement, inner, names)
        sha256 = hashlib.sha256(paths[requirement].read_bytes()).hexdigest()
        pinned[requirement] = (sha256, inner, names)
    monkeypatch.setattr(fetch_deps, "ARCHIVES", pinned)
    monkeypatch.setattr(fetch_deps, "download", lambda requirement, _: paths[requirement])
    monkeypatch.setattr("sys.argv", ["fetch_deps.py", str(tmp_path / "deps")])
    return paths


def test_all_sources_that_the_build_names_are_unpacked(archives, tmp_path):
    fetch_deps.main()
    found = {path.name for path in (tmp_path / "deps").iterdir()}
    assert found >= {"zstd.c", "zstd.h", "lz4.c", "lz4hc.c", "lz4hc.h", "xxhash.h", "complete"}
    assert (tmp_path / "deps" / "zstd.c").read_text() == "zstd.c"


def test_an_archive_with_another_hash_is_refused_and_nothing_counts_as_complete(archives, tmp_path):
    fetch_deps.main()
    with archives["lz4==4.4.5"].open("ab") as file:
        file.write(b"\0")
    with pytest.raises(SystemExit, match="not used"):
        fetch_deps.main()
    assert not (tmp_path / "deps" / "complete").exists()


def test_pinned_hashes_are_hashes():
    for sha256, _, _ in fetch_deps.ARCHIVES.values():
        assert len(bytes.fromhex(sha256)) == 32
