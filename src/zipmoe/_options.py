"""Options that several commands take. Support of `cli.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def check_tiers(text: str | None) -> str | None:
    """Refuse what does not say how much each tier holds."""
    from .tiers import parse_tiers

    if text is not None:
        try:
            parse_tiers(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return text


Codec = Literal["rank223", "rank3", "rank4", "zstd", "lz4hc", "raw"]
Tiers = Annotated[
    str | None,
    typer.Option(
        callback=check_tiers,
        metavar="F,C,S,E",
        help="How much the expert cache holds decoded (full), compressed, as sign-mantissas alone "
        "and as exponents alone: each a number of experts or, with %, a share of its memory, as "
        "0,40%,60%,0. Experts being used count as compressed. Default: all compressed.",
    ),
]
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


Store = Annotated[Path, typer.Argument(help="Folder that `zipmoe pack` made.", metavar="STORE")]
Memory = Annotated[
    int | None,
    typer.Option(
        parser=memory_size,
        metavar="SIZE",
        help="Memory that the whole process may take, as 2GB, 1.5GiB or 800MB. Default: what the "
        "cgroup or the machine has available less a reserve of a tenth, at least 256 MB.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="TOKENS",
        help="Most tokens of prompt and answers together; their KV cache is counted in the memory. "
        "Default: 4096, or the model's maximum if that is less.",
    ),
]
Compute = Annotated[
    Literal["native", "torch"],
    typer.Option(
        metavar="NAME",
        help="native: straight from the packed weights, the quick one. torch: decoded weights "
        "through torch's own operators, exactly as stock.",
    ),
]
