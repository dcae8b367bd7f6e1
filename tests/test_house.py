"""The house rules hold in this repository, and the tool that checks them can fail."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import house  # noqa: E402 - found through the path above


def test_the_repository_keeps_the_house_rules():
    assert house.breaches(ROOT) == []


BREACHES = {
    "offline imports runtime": (
        {"src/zipmoe/pack.py": "from .model import load\n", "src/zipmoe/model.py": "load = 1\n"},
        "pack imports model",
    ),
    "runtime imports offline, absolutely and inside a function": (
        {
            "src/zipmoe/generate.py": "def f():\n    import zipmoe.hub\n",
            "src/zipmoe/hub.py": "",
        },
        "generate imports hub",
    ),
    "from the package itself": (
        {"src/zipmoe/demo.py": "from zipmoe import experts\n", "src/zipmoe/experts.py": ""},
        "demo imports experts",
    ),
    "a stage imports the commands": (
        {"src/zipmoe/store.py": "from . import cli\n", "src/zipmoe/cli.py": ""},
        "store imports cli",
    ),
    "a circle": (
        {
            "src/zipmoe/store.py": "from .verify import v\n",
            "src/zipmoe/verify.py": "from .store import s\n",
        },
        "store -> verify -> store",
    ),
    "a long file": ({"src/zipmoe/store.py": "x = 1\n" * 451}, "has 451 lines"),
    "a long C++ file": ({"csrc/cache.cpp": "int x;\n" * 451}, "has 451 lines"),
    "a long function": (
        {
            "src/zipmoe/store.py": 'def f():\n    """Not\n    counted.\n    """\n'
            + "    x = 1\n" * 60
        },
        "store.f has 61 lines",
    ),
    "many parameters": (
        {"src/zipmoe/store.py": "def f(a, b, c, d, e, g, h):\n    pass\n"},
        "takes 7 positional",
    ),
    "a print": ({"src/zipmoe/store.py": "print('x')\n"}, "store:1 prints"),
    "a name that says nothing": ({"src/zipmoe/utils.py": ""}, "name it by what it does"),
    "a core that knows Python": ({"csrc/cache.cpp": "#include <Python.h>\n"}, "includes Python.h"),
}


def test_imports_for_types_alone_are_no_circle(tmp_path):
    package = tmp_path / "src" / "zipmoe"
    package.mkdir(parents=True)
    (package / "store.py").write_text("from .verify import v\n")
    (package / "verify.py").write_text("if TYPE_CHECKING:\n    from .store import s\n")
    assert house.breaches(tmp_path) == []


@pytest.mark.parametrize("case", BREACHES)
def test_a_breach_is_found(case, tmp_path):
    files, said = BREACHES[case]
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = house.breaches(tmp_path)
    assert len(found) == 1, found
    assert said in found[0]
