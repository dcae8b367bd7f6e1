"""Write the documents that are made from the code, or (--check) say which of them are stale.

    python tools/generate_docs.py [--check]

docs/cli.md comes from the commands' own help, the tables of docs/results.md, docs/serving.md and
docs/lossy.md from benchmarks/results.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from results_page import with_results
from typer.testing import CliRunner

from zipmoe.cli import app

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ("results.md", "serving.md", "lossy.md")
INTRODUCTION = """# The commands

<!-- Written by tools/generate_docs.py from the commands' help; `make docs` writes it again. -->

Results go to stdout, everything else to stderr. `--json` puts exactly one JSON document on stdout;
after an error it is `{"error": {"type": ..., "message": ...}}`.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | it cannot be done as asked: the sentence on stderr says why and what to do |
| 2 | the command line is wrong |
| 3 | the store is corrupt |
| 130 | interrupted by Ctrl-C |
"""


def help_of(*words: str) -> str:
    """Return what `zipmoe WORDS --help` prints."""
    done = CliRunner().invoke(app, [*words, "--help"], prog_name="zipmoe", color=False)
    if done.exit_code:
        raise SystemExit(done.output)
    return "\n".join(line.rstrip() for line in done.output.strip().splitlines())


def commands(of: typer.Typer) -> Iterator[list[str]]:
    """Yield the words of every command, those of groups after the others."""
    for command in of.registered_commands:
        yield [command.callback.__name__ if command.callback else ""]
    for group in of.registered_groups:
        if group.typer_instance:
            for words in commands(group.typer_instance):
                yield [str(group.name), *words]


def cli_page() -> str:
    """Return docs/cli.md as it should be."""
    parts = [INTRODUCTION, f"```text\n{help_of()}\n```"]
    parts += [
        f"## zipmoe {' '.join(words)}\n\n```text\n{help_of(*words)}\n```" for words in commands(app)
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main() -> None:
    """Write or check every generated document."""
    stale = []
    docs = ROOT / "docs"
    pages = {docs / "cli.md": cli_page()}
    pages |= {page: with_results(page) for page in map(docs.joinpath, RESULTS)}
    for path, text in pages.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(
            ("stale, run `make docs`: " if "--check" in sys.argv else "written: ")
            + ", ".join(stale)
        )
    sys.exit(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    main()
