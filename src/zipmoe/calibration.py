"""What tells how good a model is: a text → windows of tokens; a file of tasks → items.

A task file is JSON Lines, each line an object with two texts, `{"prompt": ..., "answer": ...}`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch

from zipmoe._errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

__all__ = ["Calibration", "Item", "calibration", "read_text"]

WINDOW = 256  # tokens; the first of them are told with little before them
_SAMPLE = ("demo_text.txt", "sample_text.txt")


@dataclass(frozen=True)
class Item:
    """A task: the tokens of a prompt, and those of the answer that is right."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What quality is measured on."""

    windows: Tensor  # [windows, tokens], int64
    items: tuple[Item, ...]
    sha256: str  # of the text and the task file, as they were read


def read_text(path: Path | None) -> str:
    """Read a text; None: the sample that comes with zipmoe.

    Raises
    ------
    CalibrationError
        It cannot be read, or is not UTF-8.
    """
    if path is None:
        texts = (resources.files(__package__) / name for name in _SAMPLE)
        return "\n\n".join(text.read_text(encoding="utf-8").strip() for text in texts)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as text: {error}") from error


def calibration(
    tokenizer: Any, text: str, task: str | None = None, *, window: int = WINDOW
) -> Calibration:
    """Cut a text into windows of tokens, and read a task file's contents.

    What is left at the end of the text, less than a window, is not used; a text of less than a
    window is one.

    Raises
    ------
    CalibrationError
        The text has less than two tokens, or a line of the task file is not a task.
    """
    ids = tokenizer(text)["input_ids"]
    if len(ids) < 2:
        raise CalibrationError("the calibration text has less than two tokens")
    length = min(window, len(ids))
    whole = len(ids) // length * length
    hashed = hashlib.sha256(text.encode())
    hashed.update(b"\0" + (task or "").encode())
    return Calibration(
        torch.tensor(ids[:whole]).view(-1, length),
        tuple(_items(tokenizer, task)) if task is not None else (),
        hashed.hexdigest(),
    )


def _items(tokenizer: Any, task: str) -> Sequence[Item]:
    items = []
    for number, line in enumerate(task.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            prompt, answer = found["prompt"], found["answer"]
            prompt_ids = tokenizer(prompt)["input_ids"]
            answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f'line {number} of the task file is not {{"prompt": text, "answer": text}}'
            ) from error
        if not prompt_ids or not answer_ids:
            raise CalibrationError(f"line {number} of the task file has no prompt or no answer")
        items.append(Item(tuple(prompt_ids), tuple(answer_ids)))
    if not items:
        raise CalibrationError("the task file has no tasks")
    return items
