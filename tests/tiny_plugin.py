"""Fixtures: tiny checkpoints and their stores, made once per run. Copy before you change them."""

from __future__ import annotations

import shutil

import pytest

# torch is imported in the fixtures: it takes seconds, and not every run needs it.


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Give a function: family and options of `checkpoints.build` → the folder."""
    from checkpoints import build  # noqa: PLC0415

    made = {}

    def make(family="qwen2_moe", **options):
        key = (family, tuple(sorted(options.items())))
        if key not in made:
            made[key] = build(tmp_path_factory.mktemp(family) / "checkpoint", family, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory, tiny_checkpoint):
    """Give a function: family, codec and options of `checkpoints.build` → the store."""
    from zipmoe.pack import pack_checkpoint  # noqa: PLC0415

    made = {}

    def make(family="qwen2_moe", codec="rank223", **options):
        key = (family, codec, tuple(sorted(options.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-{codec}") / "store"
            pack_checkpoint(tiny_checkpoint(family, **options), made[key], codec=codec)
        return made[key]

    return make


@pytest.fixture
def store_copy(tiny_store, tmp_path):
    """Give a function like `tiny_store` → a copy of that store, yours to damage."""

    def make(*args, **options):
        return shutil.copytree(tiny_store(*args, **options), tmp_path / "copy")

    return make


@pytest.fixture(scope="session")
def family_store(tmp_path_factory):
    """Give a function: name of a family (`families.py`) → its store, the checkpoint beside it."""
    from families import families, write_checkpoint  # noqa: PLC0415

    from zipmoe.pack import pack_checkpoint  # noqa: PLC0415

    known, made = {family.name: family for family in families()}, {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            write_checkpoint(known[name], folder / "checkpoint", 0)
            pack_checkpoint(folder / "checkpoint", folder / "store")
            made[name] = folder / "store"
        return made[name]

    return make


@pytest.fixture(scope="session")
def small_store(tmp_path_factory):
    """Give the store of a small model that has a tokenizer."""
    from small_store import write_store  # noqa: PLC0415

    return write_store(tmp_path_factory.mktemp("small"))


@pytest.fixture
def at_floor(small_store, monkeypatch):
    """Give a function that loads `small_store` with the least memory that works."""
    import zipmoe  # noqa: PLC0415
    from zipmoe import budget  # noqa: PLC0415
    from zipmoe._errors import BudgetError  # noqa: PLC0415

    now = budget.rss_bytes()
    monkeypatch.setattr(budget, "rss_bytes", lambda: now)  # or the floor moves from call to call

    def load():
        with pytest.raises(BudgetError) as caught:
            zipmoe.load(small_store, memory=1, context=64)
        return zipmoe.load(small_store, memory=caught.value.floor_bytes, context=64)

    return load
