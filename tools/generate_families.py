"""Run the sweep over all model families and write docs/families.md, or check it.

    python tools/generate_families.py [--check]

Takes a minute or two. Leaves with 1 if a family is not exact, or if the document is stale.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from family_sweep import sweep_all, table  # noqa: E402  # it lives among the tests


def main() -> None:
    """Sweep, compare, write."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = sweep_all(Path(folder))
    for outcome in outcomes:
        if outcome.differences:
            print(f"{outcome.family}: {', '.join(outcome.differences)}")
    if any(outcome.differences for outcome in outcomes):
        sys.exit(1)
    path, text = ROOT / "docs" / "families.md", table(outcomes)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    if "--check" in sys.argv[1:]:
        print("stale: docs/families.md (python tools/generate_families.py)")
        sys.exit(1)
    path.write_text(text, encoding="utf-8")
    print("written: docs/families.md")


if __name__ == "__main__":
    main()
