"""Ids on the hub, against a local server that speaks its API. HF_ENDPOINT is read at import."""

import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hub_server import COMMIT, serve

from zipmoe._errors import CheckpointError
from zipmoe.hub import resolve_checkpoint
from zipmoe.pack import pack_checkpoint
from zipmoe.unpack import unpack_store

CODE = """
import sys
from zipmoe._errors import ZipmoeError
from zipmoe.hub import resolve_checkpoint
try:
    print(resolve_checkpoint(sys.argv[1]))
except ZipmoeError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def hub(tiny_checkpoint, tmp_path):
    repo = shutil.copytree(tiny_checkpoint("mixtral", shard_size="200KB"), tmp_path / "repo")
    (repo / "README.md").write_text("a model card")
    (repo / "tokenizer.json").write_text("{}")
    (repo / "pytorch_model.bin").write_bytes(b"no")
    (repo / "consolidated.safetensors").write_bytes(b"the same weights again")
    (repo / "original").mkdir()
    (repo / "original" / "model.safetensors").write_bytes(b"and again")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"no")
    (pickled / "config.json").write_text("{}")
    with serve({"org/model": repo, "org/pickled": pickled}) as server:
        yield server


def resolve(hub, name, cache):
    """What `resolve_checkpoint` says in a process of its own."""
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    words = [sys.executable, "-c", CODE, name]
    done = subprocess.run(
        words, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_a_hub_id_is_downloaded_and_packs_to_the_published_files(hub, tmp_path):
    folder = tmp_path / resolve(hub, "org/model", tmp_path / "cache")
    assert folder.name == COMMIT
    repo = hub.repos["org/model"]
    names = {path.name for path in folder.iterdir()}
    published = {path.name for path in repo.iterdir() if path.is_file()}
    assert names == published - {"README.md", "pytorch_model.bin", "consolidated.safetensors"}
    pack_checkpoint(folder, tmp_path / "store")
    unpack_store(tmp_path / "store", tmp_path / "back")
    for path in (tmp_path / "back").iterdir():
        assert path.read_bytes() == (repo / path.name).read_bytes()


def test_a_broken_download_is_continued_by_a_range_request(tmp_path):
    repo = tmp_path / "repo"
    repo.mkdir()
    whole = random.Random(0).randbytes(25_000_000)  # the client keeps what came in steps of 10 MiB
    (repo / "model.safetensors").write_bytes(whole)
    with serve({"org/large": repo}) as hub:
        hub.cut_after = 15_000_000
        folder = tmp_path / resolve(hub, "org/large", tmp_path / "cache")
        assert [asked for _, _, asked in hub.requests if asked] == ["bytes=10485760-"]
    assert (folder / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/absent", "CheckpointError cannot get org/absent from the hub"),
        ("org/model@nowhere", "CheckpointError cannot get org/model@nowhere from the hub"),
        ("org/pickled", "UnsupportedModelError org/pickled has no safetensors but .bin"),
    ],
)
def test_what_the_hub_does_not_have_is_said(name, said, hub, tmp_path):
    assert resolve(hub, name, tmp_path / "cache").startswith(said)
    assert not any("resolve" in path for _, path, _ in hub.requests)


def test_a_revision_can_be_named(hub, tmp_path):
    assert resolve(hub, "org/model@main", tmp_path / "cache").endswith(COMMIT)


def test_a_hub_that_cannot_be_reached_is_said(tmp_path):
    closed = SimpleNamespace(endpoint="http://127.0.0.1:9")
    said = resolve(closed, "org/model", tmp_path / "cache")
    assert said.startswith("CheckpointError cannot get org/model from the hub")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./org/name", "/no/folder", "org/na me"])
def test_what_is_neither_a_folder_nor_an_id_is_refused(name):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(name)


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert resolve_checkpoint(tmp_path) == tmp_path
