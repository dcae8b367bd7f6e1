"""Run the sweep over all model families and write what it finds, or check it.

docs/families.md, and src/zipmoe/_outside.py for `zipmoe inspect`.

    python tools/generate_families.py [--check]

Takes three to four minutes. Leaves with 1 if a family is not exact, or if the document is stale.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from family_sweep import outside, sweep_all, table  # noqa: E402  # it lives among the tests


def main() -> None:
    """Sweep, compare, write."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = sweep_all(Path(folder))
    for outcome in outcomes:
        if outcome.differences:
            print(f"{outcome.family}: {', '.join(outcome.differences)}")
    if any(outcome.differences for outcome in outcomes):
        sys.exit(1)
    texts = {"docs/families.md": table(outcomes), "src/zipmoe/_outside.py": outside(outcomes)}
    for name, text in texts.items():
        path = ROOT / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if "--check" in sys.argv[1:]:
            print(f"stale: {name} (python tools/generate_families.py)")
            sys.exit(1)
        path.write_text(text, encoding="utf-8")
        print(f"written: {name}")


if __name__ == "__main__":
    main()
