"""What a benchmark of pure computations found: printed whole, and kept where --out says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def publish(document: dict[str, Any], out: Path | None) -> None:
    text = json.dumps(document, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")
