"""Runs a script in a process of its own that has the core and numpy, and nothing else of zipmoe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zipmoe import _core, _errors

unless_sanitized = pytest.mark.skipif(
    "san" in os.environ.get("LD_PRELOAD", ""),  # as sanitizer builds are run: libasan, libtsan
    reason="sanitizers keep freed memory and a shadow: what is resident says nothing of the cache",
)

# The package itself is not imported: that may cost seconds, threads and memory that tests measure.
PREAMBLE = """
import importlib.util, sys, types
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
sys.modules["zipmoe"] = package = types.ModuleType("zipmoe")
package.__path__ = []
package._errors = load("zipmoe._errors", {errors!r})
package._core = load("zipmoe._core", {core!r})
sys.path.insert(0, {tests!r})
"""


def run_script(script: str, *arguments: object, preload: str = "") -> str:
    """Standard output of the script; a failure shows what it wrote to standard error."""
    preamble = PREAMBLE.format(
        errors=_errors.__file__, core=_core.__file__, tests=str(Path(__file__).parent)
    )
    preload = ":".join(part for part in (os.environ.get("LD_PRELOAD", ""), preload) if part)
    done = subprocess.run(
        [sys.executable, "-c", preamble + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "LD_PRELOAD": preload},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
