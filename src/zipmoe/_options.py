"""Options that several commands take. Support of `cli.py`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Codec = Literal["rank223", "rank3", "rank4", "zstd", "lz4hc", "raw"]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
]


def memory_size(text: str) -> int:
    """Parse a size as 2GB, 1.5GiB or 800MB for typer."""
    from .budget import parse_memory

    try:
        return parse_memory(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
