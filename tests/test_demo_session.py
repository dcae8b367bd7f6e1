"""The steps of `zipmoe demo`: what is made again, and what is found."""

import json

import pytest

from zipmoe._demo_session import DemoSession
from zipmoe._terminal import Terminal


class Session(DemoSession):
    """A session whose commands do as little as possible, and are written down."""

    def __init__(self, folder, sha256="one"):
        super().__init__(Terminal(as_json=False), folder)
        self.folder, self.sha256, self.ran = folder, sha256, []

    def _command(self, *words):
        self.ran.append(words[0])
        if words[0] == "demo":
            return {"folder": str(self.folder), "source_bytes": 100, "sha256": self.sha256}
        store = self.folder / "store"
        store.mkdir(exist_ok=True)
        (store / "experts").write_bytes(b"x" * 40)
        (store / "zipmoe.json").write_bytes(b"x" * 20)
        return {}


def test_what_is_there_is_not_made_again(tmp_path, capsys):
    assert Session(tmp_path).prepare()["store"]["ratio"] == 0.6
    again = Session(tmp_path)
    assert again.prepare()["store"]["store_bytes"] == 60
    assert again.ran == ["demo"]
    assert "0.600 of the checkpoint" in capsys.readouterr().err


def test_an_unfinished_pack_is_continued_and_its_files_are_kept(tmp_path):
    Session(tmp_path).prepare()
    (tmp_path / "store" / "zipmoe.json").unlink()
    (tmp_path / "store" / "journal").write_text("kept")
    again = Session(tmp_path)
    again.prepare()
    assert again.ran == ["demo", "pack"]
    assert (tmp_path / "store" / "journal").exists()


@pytest.mark.parametrize("changed", ["sha256", "tool"])
def test_the_store_of_another_checkpoint_or_zipmoe_is_cleared_away(tmp_path, monkeypatch, changed):
    Session(tmp_path).prepare()
    (tmp_path / "store" / "old").write_text("old")
    if changed == "tool":
        monkeypatch.setattr("zipmoe._demo_session.__version__", "9")
    again = Session(tmp_path, sha256="two" if changed == "sha256" else "one")
    again.prepare()
    assert again.ran == ["demo", "pack"]
    assert not (tmp_path / "store" / "old").exists()
    assert json.loads((tmp_path / "store.json").read_text())["sha256"] == again.sha256


def test_a_command_that_fails_ends_the_demo_with_its_code(tmp_path, capfd):
    session = DemoSession(Terminal(as_json=False), tmp_path)
    with pytest.raises(SystemExit) as left:
        session._command("verify", str(tmp_path))
    assert left.value.code == 1
    assert "is not a zipmoe store" in capfd.readouterr().err
