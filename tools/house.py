"""House rules that no linter knows: sizes, parameters, the direction of imports, who may print.

    python tools/house.py [ROOT]

Prints every breach and leaves with 1 if there is one. tests/test_house.py proves that it can.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_POSITIONAL = 450, 60, 6

# The two halves of the package meet only in the store's format.
OFFLINE = {"checkpoint", "recipe", "pack", "unpack", "hub", "demo", "_smollm"}
RUNTIME = {
    "model",
    "experts",
    "budget",
    "generate",
    "attention",
    "blocks",
    "dense",
    "gated",
    "kv",
    "layers",
    "linear",
    "norm",
    "packed",
    "recording",
    "serve",
    "_expert_engine",
    "_forwards",
    "_native_block",
    "_expert_source",
    "footprint",
    "lending",
    "pressure",
    "rows",
    "_cgroups",
    "_quantizer",
    "_measuring",
    "_rehearsal",
    "_renaming",
    "_skeleton",
    "importance",
    "lowered",
    "quality",
    "rounding",
    "sampling",
    "streams",
}
# The commands know both halves; the package's front door names what both offer.
ABOVE = {"cli", "__main__", "__init__"}
ABOVE |= {
    "_terminal",
    "_report",
    "_session",
    "_chat",
    "_demo_session",
    "_options",
    "_plan_command",
    "_planning",
    "_quantize_command",
    "_routing_commands",
    "_serve_command",
    "quantize",  # measures in the one half and writes in the other
}
PRINTING = {"cli", "_terminal"}
# Nothing in the core may know these.
CORE_FORBIDDEN = re.compile(r'#include\s*[<"](torch|ATen|c10|Python\.h|nanobind)')
WORDS = {"utils", "common", "misc", "helpers"}


def modules(root: Path) -> Iterator[tuple[str, Path, ast.Module]]:
    """Yield (module path inside the package, file, tree) of every Python file of the package."""
    package = root / "src" / "zipmoe"
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts)
        yield name, path, ast.parse(path.read_text(encoding="utf-8"))


def running(node: ast.AST) -> Iterator[ast.AST]:
    """Walk through all that runs: what stands under `if TYPE_CHECKING` does not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING":
            continue
        yield child
        yield from running(child)


def imported(name: str, tree: ast.Module) -> set[str]:
    """Return the rooms of the package that a module imports when it runs, anywhere in its code."""
    found = set()
    for node in running(tree):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = ["zipmoe", *name.split(".")][: -node.level]
                base = ".".join([*folder, base] if base else folder)
            for alias in node.names:
                found.add(f"{base}.{alias.name}")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    rooms = {target.split(".")[1] for target in found if target.startswith("zipmoe.")}
    return {room for room in rooms if room.islower()} - {name.split(".", maxsplit=1)[0]}


def import_breaches(graph: dict[str, set[str]]) -> Iterator[str]:
    """Yield breaches of the direction of imports; `graph` is room -> rooms it imports."""
    for room, targets in sorted(graph.items()):
        for target in sorted(targets & graph.keys()):
            if (room in OFFLINE and target in RUNTIME) or (room in RUNTIME and target in OFFLINE):
                yield f"{room} imports {target}: the offline and the runtime half never meet"
            if target in ABOVE and room not in ABOVE:
                yield f"{room} imports {target}: nothing imports the commands"
    yield from (f"imports go in a circle: {' -> '.join(circle)}" for circle in circles(graph))


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Yield each circle of imports once, beginning at its first name."""

    def walk(path: list[str]) -> Iterator[list[str]]:
        for target in sorted(graph.get(path[-1], ())):
            if target == path[0]:
                yield [*path, target]
            elif target > path[0] and target not in path:
                yield from walk([*path, target])

    for room in sorted(graph.keys() - ABOVE):
        yield from walk([room])


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many lines of a function are its docstring; documentation is not length."""
    if ast.get_docstring(node, clean=False) is None:
        return 0
    return (node.body[0].end_lineno or 0) - node.body[0].lineno + 1


def code_breaches(name: str, tree: ast.Module) -> Iterator[str]:
    """Yield functions that are too long or take too much, and prints outside the commands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1 - docstring_lines(node)
            if lines > MAX_FUNCTION_LINES:
                yield f"{name}.{node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"
            positional = len(node.args.posonlyargs) + len(node.args.args)
            if positional > MAX_POSITIONAL:
                yield f"{name}.{node.name} takes {positional} positional parameters"
        prints = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if prints and node.func.id == "print" and name.split(".", maxsplit=1)[0] not in PRINTING:
            yield f"{name}:{node.lineno} prints; only the commands print"


def file_breaches(root: Path) -> Iterator[str]:
    """Yield files too long, files whose name says nothing, and cores that know too much."""
    sources = [*(root / "src").rglob("*.py"), *(root / "csrc").rglob("*.[ch]*")]
    for path in sorted(sources):
        text = path.read_text(encoding="utf-8")
        place = path.relative_to(root)
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            yield f"{place} has {lines} lines, at most {MAX_FILE_LINES}"
        if path.stem in WORDS:
            yield f"{place}: name it by what it does"
        if "csrc" in path.parts and not path.stem.startswith("bindings"):
            for match in CORE_FORBIDDEN.finditer(text):
                yield f"{place} includes {match[1]}; the core knows neither Python nor torch"


def breaches(root: Path) -> list[str]:
    """Return every breach of the house rules under `root`."""
    found = list(file_breaches(root))
    graph: dict[str, set[str]] = {}
    for name, _, tree in modules(root):
        found += code_breaches(name, tree)
        graph.setdefault(name.split(".")[0], set()).update(imported(name, tree))
    return found + list(import_breaches(graph))


def main() -> None:
    """Print the breaches and leave with their verdict."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = breaches(root)
    for breach in found:
        print(breach)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
