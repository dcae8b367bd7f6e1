"""One engine in a memory group: fed forced tokens from a cold start, it tells what they took."""

from __future__ import annotations

import hashlib
import importlib
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine import Engine, measured


class Arm:
    """Joins the group that `processes` names ("": none) before the engine is made."""

    def __init__(self, processes: str, engine: str, **arguments: Any) -> None:
        if processes:
            Path(processes).write_text(str(os.getpid()))
        module, name = engine.split(":")
        begin = time.perf_counter()
        with measured() as usage:
            self.engine: Engine = getattr(importlib.import_module(module), name)(**arguments)
        self.load = asdict(usage) | {"seconds": time.perf_counter() - begin}

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        self.engine.reset()
        return self._pass([prompt])

    def decode(self, ids: list[int]) -> dict[str, Any]:
        return self._pass([[token] for token in ids])

    def facts(self) -> dict[str, Any]:
        from zipmoe._process import peak_rss_bytes  # noqa: PLC0415

        facts = self.engine.facts()
        return facts | {"load": self.load, "peak_rss_bytes": peak_rss_bytes()}

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.engine, method)(*arguments)

    def _pass(self, passes: list[list[int]]) -> dict[str, Any]:
        """Feed one list of tokens after the other; seconds of each, and what they answered."""
        before = self.engine.counters()
        seconds, answers, digest = [], [], hashlib.sha256()
        with measured() as usage:
            for ids in passes:
                begin = time.perf_counter()
                self.engine.feed(ids)
                seconds.append(time.perf_counter() - begin)
                logits = self.engine.logits()
                answers.append(int(logits.argmax()))
                digest.update(logits.tobytes())
        after = self.engine.counters()
        return {
            "seconds": seconds,
            "answers": answers,
            "logits_sha256": digest.hexdigest(),
            "counters": {name: after[name] - before[name] for name in before},
            "usage": asdict(usage),
        }
