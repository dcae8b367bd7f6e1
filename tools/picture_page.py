"""Draw docs/page.png: the server's page after two questions to the demo model in 2 GB.

    python tools/picture_page.py [docs/page.png]

Needs the demo's store (`make demo`) and Debian's chromium and chromium-driver (`make test` brings
them).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from operator import methodcaller
from typing import TYPE_CHECKING

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from zipmoe.demo import cache_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.")
ANSWERED = (
    "return document.querySelectorAll('li.assistant').length == {}"
    " && document.getElementById('stop').hidden"
)
WINDOW = "--window-size=1280,940"


@contextmanager
def serving() -> Iterator[str]:
    """Run a server; give its address."""
    command = [sys.executable, "-m", "zipmoe", "serve", str(cache_folder() / "store")]
    command += ["--name", "demo", "--memory", "2GB", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        try:
            for line in server.stderr:
                if line.startswith("ready:"):
                    yield line.split()[-1]
                    return
            raise SystemExit("the server did not start")
        finally:
            server.terminate()


def main() -> None:
    """Draw it."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", WINDOW):
        options.add_argument(word)
    with serving() as address:
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        with webdriver.Chrome(options=options, service=service) as page:
            page.get(address)
            for number, question in enumerate(QUESTIONS, 1):
                page.switch_to.active_element.send_keys(f"{question}\n")
                answered = ANSWERED.format(number)
                WebDriverWait(page, 60).until(methodcaller("execute_script", answered))
            time.sleep(2)  # the machine is looked at once a second
            page.save_screenshot(sys.argv[1] if len(sys.argv) > 1 else "docs/page.png")


if __name__ == "__main__":
    main()
