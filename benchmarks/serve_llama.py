"""llama.cpp in a memory group, stepping the sequences of several requests together."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from engine import measured
from engine_llama import LlamaEngine


class Slots:
    """Joins the group that `processes` names ("": none) and maps a GGUF file."""

    def __init__(
        self, processes: str, path: str, *, context: int, sequences: int, threads: int
    ) -> None:
        if processes:
            Path(processes).write_text(str(os.getpid()))
        self.engine = LlamaEngine(path, context=context, threads=threads, sequences=sequences)

    def decode(
        self, prompts: list[list[int]], answers: list[list[int]], skipped: int, timed: int
    ) -> dict[str, Any]:
        """Write answers side by side, as `serve_arm.Served.decode`."""
        self.engine.reset()
        seconds = []
        with measured() as usage:
            self.engine.feed_each(prompts, 0)
            for step in range(skipped + timed):
                begin = time.perf_counter()
                tokens = [[answer[step]] for answer in answers]
                self.engine.feed_each(tokens, len(prompts[0]) + step)
                seconds.append(time.perf_counter() - begin)
        return {"seconds": seconds[skipped:], "foreign_share": usage.foreign_share}

    def facts(self) -> dict[str, Any]:
        return self.engine.facts()
