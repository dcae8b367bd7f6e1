"""The page in headless Chromium, Debian's: talks, stops, shows the machine, asks nobody else."""

import json
import shutil
import time

import pytest
from serving import serving
from small_store import write_store
from waiting import until

import zipmoe
from zipmoe.generate import generate
from zipmoe.serve.limits import Limits

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if BROWSER is None or DRIVER is None:
    # `make test` installs them where it is root on Debian; elsewhere there may be none to install.
    pytest.skip("Debian's chromium and chromium-driver are not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def served(store):
    with serving(store, context=200, limits=Limits(answer_tokens=40)) as found:
        yield found


@pytest.fixture
def page(served):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,800"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get(f"{served.url}/")
    try:
        until(lambda: text(driver, "#model") == "tiny")
        yield driver
        bad = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert bad == []
    finally:
        driver.quit()


def text(page, selector):
    return page.execute_script(f"return document.querySelector({json.dumps(selector)}).textContent")


def answers(page):
    script = (
        "return [...document.querySelectorAll('li.assistant')].map(i => i.firstChild.textContent)"
    )
    return page.execute_script(script)


def settle(page):
    until(lambda: page.execute_script("return document.getElementById('stop').hidden"))


def type_keys(page, keys):
    """Type where the focus is, as a person without a mouse does."""
    page.switch_to.active_element.send_keys(keys)


def test_it_talks_by_keyboard_alone_and_goes_on(page, store):
    type_keys(page, "hello\n")
    until(lambda: answers(page))
    settle(page)
    type_keys(page, "more\n")
    until(lambda: len(answers(page)) == 2)
    settle(page)
    messages = [{"role": "user", "content": "hello"}]
    with zipmoe.load(store, memory="16GB", context=200) as loaded:
        alone = generate(loaded, messages, max_tokens=100).text
    assert answers(page)[0][:20] == alone[:20]
    page.execute_script("document.activeElement.blur()")
    webdriver.ActionChains(page).key_down("\ue00a").send_keys("n").key_up("\ue00a").perform()
    assert answers(page) == []


def test_escape_stops_an_answer_and_the_server_notices(page, served):
    served.streams.before = lambda: time.sleep(0.05)
    try:
        type_keys(page, "hello\n")
        until(lambda: answers(page) and answers(page)[0])
        type_keys(page, "\ue00c")
        settle(page)
        until(lambda: served.service.scheduler.load()["running"] == 0, 3)
    finally:
        served.streams.before = lambda: None
    assert served.lines[-1]["status"] == 499


def test_it_shows_the_machine_and_asks_no_other_host(page, served):
    type_keys(page, "hello\n")
    settle(page)
    until(lambda: "tokens/s" in text(page, "#time-text"))
    assert "promised" in text(page, "#memory-text")
    assert "room for" in text(page, "#experts-text")
    assert "compressed" in text(page, "#experts-legend")
    assert text(page, "#diagnosis")
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    names = page.execute_script(script)
    assert len(names) >= 3
    assert all(name.startswith(served.url) for name in names)


def test_it_follows_the_dark_mode(page):
    def ground():
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    light = ground()
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [dark]})
    assert ground() != light


def test_a_server_that_is_gone_is_said(page, served):
    served.service.scheduler.stop()
    until(lambda: text(page, "#status") == "stopping")
