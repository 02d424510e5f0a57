"""The page in a browser: what a person sees and does. Screenshots go to $INFERLOOM_SCREENSHOTS if that is set."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.runtime.server.conftest import Server
from tests.runtime.server.page_stub import EVIL, KEY, Stub, running

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not (CHROMIUM and DRIVER and find_spec("selenium")),
    reason="needs chromium, chromedriver (Debian: chromium-driver) and the package selenium")]

#: How many blocks the first session of the table has in the pool.
BLOCKS = "return parseInt(document.querySelector('#sessions-rows .where').textContent)"


class Page:
    """A window on the page. At its end nothing may have gone wrong in it, and nothing been asked of another origin."""

    def __init__(self, url: str, width: int = 1360, height: int = 900, dark: bool = False) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        assert CHROMIUM and DRIVER
        options.binary_location = CHROMIUM
        for each in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(each)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.url, self.driver = url, webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        _open.append(self.driver)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
        if dark:
            self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {
                "features": [{"name": "prefers-color-scheme", "value": "dark"}]})
        self.driver.get(url)

    def __call__(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def keys(self, *keys: str) -> None:
        """To whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    @property
    def focus(self) -> str:
        return str(self.js("return document.activeElement.id"))

    def until(self, true: Callable[[], Any], seconds: float = 20) -> Any:
        end = time.monotonic() + seconds
        while not (value := true()):
            assert time.monotonic() < end, (self("body").text, self.driver.get_log("browser"))
            time.sleep(0.02)
        return value

    def ask(self, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.until(lambda: self("#model").get_attribute("value"))
        self("#prompt").send_keys(text, Keys.ENTER)

    def set(self, css: str, value: str) -> None:
        self.js("document.querySelector(arguments[0]).value = arguments[1]", css, value)

    def answer(self) -> str:
        return str(self.all(".turn.assistant > .text")[-1].get_attribute("textContent"))

    def done(self) -> None:
        self.until(lambda: not self("#stop").is_displayed())

    def shot(self, name: str) -> None:
        if folder := os.environ.get("INFERLOOM_SCREENSHOTS"):
            time.sleep(0.3)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))

    def close(self, expected: tuple[str, ...] = ()) -> None:
        """`expected`: parts of the messages that the browser itself writes about answers with an error."""
        said = [line for line in self.driver.get_log("browser")
                if line["level"] != "INFO" and not any(part in line["message"] for part in expected)]
        assert not said
        asked = [e["params"]["request"]["url"] for line in self.driver.get_log("performance")
                 if (e := json.loads(line["message"])["message"])["method"] == "Network.requestWillBeSent"]
        assert asked and all(url.startswith(self.url + "/") for url in asked), asked
        assert self.js("return window.hit") is None


_open: list[Any] = []


@pytest.fixture(autouse=True)
def _quit() -> Iterator[None]:
    yield
    while _open:
        _open.pop().quit()


@pytest.fixture
def stub() -> Iterator[tuple[Stub, str]]:
    made = Stub()
    with running(made) as url:
        yield made, url


def test_a_conversation(server: Server) -> None:
    page = Page(server.url)
    page.ask("import os")
    page.until(page.answer)  # some of it is there before all of it
    assert page("#stop").is_displayed() and page("#log").get_attribute("aria-busy") == "true"
    page.done()
    first = page("#log .turn.assistant .facts").text
    assert "tok/s" in first and "tokens" in first and "prompt tokens cached" in first, first
    page.ask("import sys " * 20)
    page.done()
    page.ask("and more")
    page.done()
    assert "· 0 of" not in page.all(".turn.assistant .facts")[-1].text, "the beginning is not computed again"
    assert len(page.all(".turn")) == 6
    page.until(lambda: int(page(".legend .cached b").text.replace(",", "")) > 0)
    assert page('[data-is="hits"]').text.endswith("%")
    page.shot("real")
    page("#new").click()
    assert not page.all(".turn") and page.focus == "prompt"
    page.close()


def test_a_model_without_a_template_continues_text(start: Callable[..., Server], demo_bf16: Path) -> None:
    server = start("--served-model-name", "plain", artifact=demo_bf16)
    page = Page(server.url)
    page.until(lambda: "has no chat template" in page("#empty").text)
    assert page("#prompt").get_attribute("placeholder") == "Text to continue" and not page("#system").is_enabled()
    page.set("#temperature", "0")
    page.set("#most", "16")
    page.ask("def read_lines(path):")
    page.done()
    asked = {"prompt": "def read_lines(path):", "max_tokens": 16, "temperature": 0}
    first = httpx.post(server.url + "/v1/completions", json=asked).json()["choices"][0]["text"]
    assert page.answer() == first
    page.ask("# and")
    page.done()
    asked["prompt"] = f"def read_lines(path):{first}# and"
    assert page.answer() == httpx.post(server.url + "/v1/completions", json=asked).json()["choices"][0]["text"]
    page.close()


def test_stop_frees_the_request(server: Server) -> None:
    from selenium.webdriver.common.keys import Keys

    page = Page(server.url)
    for stop in (lambda: page("#stop").click(), lambda: page.keys(Keys.ESCAPE)):
        page.until(lambda: page("#model").get_attribute("value"))
        page.set("#most", "900")
        page.set("#temperature", "1")
        page.ask("def count(numbers):")
        page.until(page.answer)
        stop()
        page.done()
        assert page.all(".turn.assistant .facts")[-1].text.endswith("stopped")

        def running() -> int:
            return int(httpx.get(server.url + "/v1/engine").json()["data"][0]["running"])

        page.until(lambda: running() == 0, 2)
        page("#new").click()
    page.close()


def test_a_session_waits_and_goes_on(start: Callable[..., Server], tmp_path: Path) -> None:
    from selenium.webdriver.support.select import Select

    server = start("--ram-bytes", "64MiB", "--state-dir", str(tmp_path))
    page = Page(server.url)
    page.until(lambda: page("#session").get_attribute("value"))
    page.set("#session", "walk")
    page.set("#most", "64")
    page.ask("from collections import deque, " * 4)
    page.done()
    row = page.until(lambda: page.all("#sessions-rows tr"))[0]
    assert row.text.startswith("walk") and "in the pool" in row.text
    for place, said in (("keep", "leased for 300 s"), ("ram", ""), ("disk", "saved")):
        Select(row.find_element("css selector", ".place")).select_by_value(place)
        row.find_element("css selector", "[data-do=pause]").click()
        page.until(lambda: f"{'deferred' if place == 'disk' else 'accepted'}, {page.js(BLOCKS)} blocks, {place}" in page(
            "#sessions-said").text)
        page.until(lambda: said in row.text)
        if place == "keep":
            page.until(lambda: int(page(".legend .leased b").text) > 0)
    page.until(lambda: "of 64.0 MiB" in page("[data-tier=ram] dd").text)
    page.until(lambda: not page("[data-tier=disk] dd").text.startswith("0 B"))
    page.shot("real")
    row.find_element("css selector", "[data-do=resume]").click()
    page.until(lambda: "walk: accepted" in page("#sessions-said").text and "keep" in page("#sessions-said").text)
    page.ask("and now")
    page.done()
    assert "· 0 of" not in page.all(".turn.assistant .facts")[-1].text
    row.find_element("css selector", "[data-do=close]").click()
    page.until(lambda: page("#sessions-none").is_displayed())
    assert httpx.get(server.url + "/v1/sessions").json()["data"] == []
    page.close()


def test_engine_numbers_move(server: Server) -> None:
    page = Page(server.url)
    page.until(lambda: page("#link-text").text == "ready" and page.all(".engine"))
    page.set("#most", "900")
    page.ask("class Numbers:\n")
    page.until(lambda: page('[data-is="running"]').text.startswith("1 /"))
    page.until(lambda: float(page('[data-is="generated"]').text.replace(",", "")) > 0)
    page.until(lambda: float(page(".stack .in_use").get_attribute("width")) > 0)
    page("#stop").click()
    page.done()
    page.until(lambda: page('[data-is="running"]').text.startswith("0 /"))
    page.close()


def test_by_keyboard_alone(stub: tuple[Stub, str]) -> None:
    from selenium.webdriver.common.keys import Keys

    page = Page(stub[1])
    page.until(lambda: page.all("#sessions-rows tr"))
    assert page.focus == "prompt"
    page.keys("one", Keys.SHIFT + Keys.ENTER + Keys.NULL, "two", Keys.ENTER)
    page.done()
    assert stub[0].asked[-1]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    seen = []
    for _ in range(30):
        page.keys(Keys.TAB)
        style = page.js("const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]")
        name = page.js("const e = document.activeElement; return e.labels?.[0]?.textContent || e.ariaLabel || e.textContent")
        if page.js("return document.activeElement === document.body"):
            break
        assert style[0] != "none" and style[1] != "0px", "the focus is seen"
        assert name.strip(), "everything has a name"
        seen.append(name.strip())
    assert "Pause agent" in seen and "Close agent" in seen and "Send" in seen, seen
    page("[aria-label='Close agent']").send_keys(Keys.ENTER)
    page.until(lambda: ("close", "agent", {}) in stub[0].calls and page.focus == "sessions-title")
    page.close()


def test_what_a_model_says_is_text(stub: tuple[Stub, str]) -> None:
    stub[0].answer = [(EVIL, EVIL), ("\n```html\n" + EVIL + "\n```\nafter", "")]
    page = Page(stub[1])
    page.ask(EVIL)
    page.done()
    assert page.answer() == EVIL + EVIL + "after"
    assert page(".turn.assistant pre").text == EVIL and page(".turn.user > .text").text == EVIL
    assert page(".assistant .thoughts .text").get_attribute("textContent") == EVIL
    assert page("th .name").text in (EVIL, "agent") and not page.all("#log img, #log b, #log script, tbody img, tbody b")
    stub[0].answer = (400, EVIL)
    page.ask("again")
    page.done()
    assert page.all(".turn .problem")[-1].text == EVIL
    assert not page.all("#log img, #log b")
    page.close(("400 (Bad Request)",))


def test_reasoning_facts_and_what_is_sent(stub: tuple[Stub, str]) -> None:
    stub[0].answer = [("", "so "), ("", "then"), ("forty", ""), ("-two", "")]
    page = Page(stub[1])
    page("summary").click()
    page("#system").send_keys("Be brief.")
    page.set("#temperature", "0.5")
    page.ask("what?")
    page.done()
    assert page.answer() == "forty-two" and not page(".assistant .thoughts").get_attribute("open")
    assert page(".assistant .thoughts .text").get_attribute("textContent") == "so then"
    facts = page(".turn.assistant .facts").text
    assert "45 tokens · " in facts and "tok/s" in facts and "128 of 200 prompt tokens cached" in facts
    page.ask("and?")
    page.done()
    sent = stub[0].asked[-1]
    assert [m["content"] for m in sent["messages"]] == ["Be brief.", "what?", "forty-two", "and?"]
    assert sent["temperature"] == 0.5 and sent["max_tokens"] == 512 and sent["session_id"].startswith("page-")
    page.close()


def test_errors_are_said(stub: tuple[Stub, str]) -> None:
    made, url = stub
    page = Page(url)
    made.answer = (429, "12 sequences wait")
    page.ask("first")
    page.done()
    assert page.all(".problem")[-1].text == "12 sequences wait (again in 7 s)"
    assert page("#prompt").get_attribute("value") == "first", "what was not answered is not lost"
    page("#prompt").clear()
    made.answer = [("half", ""), ("!error", "the engine died")]
    page.ask("second")
    page.done()
    assert page.answer() == "half" and page.all(".problem")[-1].text == "the engine died"
    page.set("#temperature", "9")
    page.ask("third")
    assert len(made.asked) == 2 and page("details.options").get_attribute("open")
    page.close(("429 (Too Many",))


def test_a_server_that_is_away_comes_back(stub: tuple[Stub, str], start: Callable[..., Server]) -> None:
    server = start()
    page = Page(server.url)
    page.until(lambda: page("#link-text").text == "ready")
    server.process.kill()
    page.until(lambda: page("#link-text").text == "no answer")
    assert "away" in page("body").get_attribute("class")
    page.ask("anybody?")
    page.done()
    assert page.all(".problem")[-1].text == "The server does not answer."
    page.close(("ERR_CONNECTION",))


def test_a_hidden_page_does_not_ask(stub: tuple[Stub, str]) -> None:
    page = Page(stub[1])
    page.until(lambda: page.all(".engine"))
    count = "return performance.getEntriesByType('resource').filter(e => e.name.endsWith('/v1/engine')).length"
    page.js("Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))")
    time.sleep(1.2)  # what was under way may end
    before = page.js(count)
    time.sleep(2.2)
    assert page.js(count) == before
    page.js("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    page.until(lambda: page.js(count) > before, 5)
    page.close()


def test_a_key(stub: tuple[Stub, str]) -> None:
    from selenium.webdriver.common.keys import Keys

    made, url = stub
    made.key = True
    page = Page(url)
    page.until(lambda: page.focus == "key")
    assert page("#link-text").text == "This server wants an API key." and not page.all(".engine")
    page.keys("wrong", Keys.ENTER)
    page.until(lambda: page("#link-text").text == "This API key is not valid here.")
    page.until(lambda: page.focus == "key")
    page.keys(KEY, Keys.ENTER)
    page.until(lambda: page("#link-text").text == "ready" and page.all(".engine"))
    assert not page("#key-form").is_displayed()
    assert KEY not in page.driver.page_source and page.js("return localStorage.length") == 0
    page.ask("now")
    page.done()
    assert page.answer() == "hello"
    page.close(("401 (Unauthorized)",))


def test_sessions(stub: tuple[Stub, str]) -> None:
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    made, url = stub
    page = Page(url)
    row = page.until(lambda: [r for r in page.all("#sessions-rows tr") if r.text.startswith("agent")])[0]
    assert "1,234 tokens" in row.text and "38 in the pool" in row.text
    Select(row.find_element("css selector", ".place")).select_by_value("keep")
    row.find_element("css selector", "[data-do=pause]").click()
    page.until(lambda: "leased for 300 s" in row.text)
    assert made.calls[-1] == ("pause", "agent", {"model": "stub", "seconds": 300, "place": "keep"})
    assert "accepted, 38 blocks, keep, 300 s" in page("#sessions-said").text
    page.shot("desktop")
    time = row.find_element("css selector", ".time")
    assert [option.get_attribute("value") for option in Select(time).options] == ["60", "300", "1800", "3600", "86400"]
    time.send_keys("1 h", Keys.TAB, Keys.ENTER)  # by keyboard: chosen by its name, then the button behind it
    page.until(lambda: "leased for 3600 s" in row.text)
    assert made.calls[-1] == ("pause", "agent", {"model": "stub", "seconds": 3600, "place": "keep"})
    assert "accepted, 38 blocks, keep, 3600 s" in page("#sessions-said").text
    page.until(lambda: time.get_attribute("value") == "3600")  # what was chosen stays chosen
    Select(row.find_element("css selector", ".place")).select_by_value("disk")
    row.find_element("css selector", "[data-do=pause]").click()
    page.until(lambda: "there is no disk tier" in page("#sessions-said").text)
    row.find_element("css selector", "[data-do=resume]").click()
    page.until(lambda: made.calls[-1][:2] == ("resume", "agent") and "leased" not in row.text)
    for name in (EVIL, "agent"):
        page.js("[...document.querySelectorAll('[data-do=close]')].find(b => b.ariaLabel === 'Close ' + arguments[0]).click()",
                name)
        page.until(lambda: name not in made.sessions and name not in page.js(
            "return [...document.querySelectorAll('#sessions-rows .name')].map(e => e.textContent)"))
    assert page("#sessions-none").is_displayed()
    page.close()


@pytest.mark.parametrize("name, width, height, dark", [
    ("phone", 390, 844, False), ("phone-dark", 360, 740, True), ("desktop-dark", 1360, 900, True), ("small", 1024, 700, False)])
def test_it_fits(stub: tuple[Stub, str], name: str, width: int, height: int, dark: bool) -> None:
    stub[0].answer = [("Here is one way:\n\n```python\ndef read_lines(path):\n    with open(path) as file:\n"
                       "        return file.read().splitlines()  # without their ends, whatever these are in the file\n```\n"
                       "It closes the file, too. " + "And so it goes on. " * 12, "The user wants lines of a file.")]
    del stub[0].sessions[EVIL]
    page = Page(stub[1], width, height, dark)
    page.ask("Show me how to read the lines of a file.")
    page.done()
    page.until(lambda: page.all("#sessions-rows tr"))
    time.sleep(2)
    for part in ("chat", "engine", "sessions"):
        button = page(f"[data-show={part}]")
        if button.is_displayed():
            button.click()
        assert page(f"#{part}").is_displayed()
        assert page.js("return document.documentElement.scrollWidth") <= width
        page.shot(f"{name}-{part}" if button.is_displayed() else name)
    assert page.js("return matchMedia('(prefers-color-scheme: dark)').matches") == dark
    page.close()
