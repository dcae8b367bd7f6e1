"""The demo from nothing to answers: build the model, pack it, talk to it.

Support of `cli.py`. Building and packing run as commands of their own, so that the memory they took
is not this process's when it comes to a chat inside a budget.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from . import __version__
from .budget import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from ._terminal import Terminal
    from .model import Loaded

MAX_TOKENS = 64


class DemoSession:
    """The steps of `zipmoe demo`; files live in `folder`."""

    def __init__(self, terminal: Terminal, folder: Path) -> None:
        self._terminal, self._folder = terminal, folder
        self._store, self._made_of = folder / "store", folder / "store.json"

    def build(self) -> dict[str, Any]:
        """Make the checkpoint in this process, or find it; return what it is."""
        from .demo import build_checkpoint

        with self._terminal.progress("Building") as progress:
            made = build_checkpoint(self._folder, progress=progress)
        self._terminal.say(
            f"checkpoint: {made.folder}, {format_bytes(made.size_bytes)}"
            f"{', made before' if made.cached else ''}\nSHA-256 of its weights: {made.sha256}"
        )
        return {
            "folder": str(made.folder),
            "source_bytes": made.size_bytes,
            "sha256": made.sha256,
            "cached": made.cached,
        }

    def prepare(self) -> dict[str, Any]:
        """Make checkpoint and store, or find them; say both sizes. Return what they are."""
        self._terminal.say(f"the demo model is kept in {self._folder}; making it takes a minute")
        checkpoint = self._command("demo", "--build-only", "--folder", str(self._folder))
        # A store of another checkpoint, or made by another zipmoe, is not this demo's.
        made_of = {"sha256": checkpoint["sha256"], "tool": __version__}
        if not self._made_of.exists() or json.loads(self._made_of.read_text()) != made_of:
            shutil.rmtree(self._store, ignore_errors=True)
            self._made_of.write_text(json.dumps(made_of))
        if not (self._store / "zipmoe.json").exists():  # also goes on with a pack that was stopped
            self._terminal.say("packing it")
            self._command("pack", checkpoint["folder"], str(self._store))
        store_bytes = sum(path.stat().st_size for path in self._store.iterdir())
        ratio = store_bytes / checkpoint["source_bytes"]
        self._terminal.say(
            f"store:      {self._store}, {format_bytes(store_bytes)}, {ratio:.3f} of the checkpoint"
        )
        store = {"folder": str(self._store), "store_bytes": store_bytes, "ratio": ratio}
        return {"checkpoint": checkpoint, "store": store}

    def answer_questions(self, loaded: Loaded) -> list[dict[str, Any]]:
        """Answer the demo's questions one by one; return what `generate --json` says of each."""
        from ._report import measured
        from ._session import answer
        from .demo import QUESTIONS

        answers = []
        for question in QUESTIONS:
            self._terminal.write(f"\n> {question}\n")
            result = answer(
                self._terminal,
                loaded,
                [{"role": "user", "content": question}],
                max_tokens=MAX_TOKENS,
            )
            self._terminal.say(measured(result))
            answers.append({"question": question} | result.as_dict())
        return answers

    def _command(self, *words: str) -> dict[str, Any]:
        """Run `zipmoe` with these words and --json; return its document.

        What it tells the person comes through. Where it fails it has said why: its code is ours.
        """
        done = subprocess.run(  # noqa: S603 - our own command line
            [sys.executable, "-m", "zipmoe", *words, "--json"], stdout=subprocess.PIPE, check=False
        )
        if done.returncode:
            raise SystemExit(done.returncode)
        return dict(json.loads(done.stdout))
