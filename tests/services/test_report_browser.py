"""The report in a real browser: its script runs under its own policy, hostile text does nothing, it fits a phone.

Drives a Chromium over its debugging pipe, which needs no driver: commands are JSON ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_runs import bare_run, good_run, hostile_run
from required import lacking

from opd.report import render

pytestmark = pytest.mark.services

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Browser:
    """One headless Chromium with one page. `events` holds what the page reported: errors, requests, console lines."""

    def __init__(self, binary: str, profile: Path) -> None:
        commands, self._send = os.pipe()
        self._receive, replies = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]

        def wire() -> None:  # Chromium reads its commands from 3 and answers on 4
            spare = [os.dup(commands), os.dup(replies)]
            os.dup2(spare[0], 3)
            os.dup2(spare[1], 4)

        self._process = subprocess.Popen(
            [binary, *flags, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=wire, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(replies)
        self._buffer, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            reply = self._next()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                result: dict[str, Any] = reply["result"]
                return result
            self.events.append(reply)
        raise TimeoutError(method)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._receive, 1 << 20)
            if not part:
                raise EOFError("the browser ended")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def show(self, path: Path, *, wide: int = 1280, tall: int = 900, theme: str = "light", anchor: str = "") -> None:
        self.events.clear()
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        self.command(
            "Emulation.setDeviceMetricsOverride", width=wide, height=tall, deviceScaleFactor=1, mobile=wide < 600
        )
        self.command("Page.navigate", url="about:blank")
        self.command("Page.navigate", url=path.as_uri() + anchor)
        for _ in range(200):
            if self.run("document.readyState === 'complete' && location.protocol === 'file:'"):
                return
            time.sleep(0.05)
        raise TimeoutError(path)

    def run(self, script: str) -> Any:
        reply = self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def picture(self) -> bytes:
        return base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"])

    def complaints(self) -> list[Any]:
        """Exceptions, console and policy messages, and requests for anything but the page itself."""
        found: list[Any] = [e for e in self.events if e.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
        found += [e for e in self.events if e.get("method") == "Runtime.consoleAPICalled"]
        urls = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return found + [url for url in urls if not url.startswith(("file:", "about:")) or not url.endswith(PAGES)]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._send)
        os.close(self._receive)


PAGES = ("about:blank", ".html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = next((found for name in NAMES if (found := shutil.which(name))), None)
    if binary is None:
        lacking("browser", "no Chromium: install one of " + ", ".join(NAMES))
    started = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    good, slow = good_run(folder, steps=120), good_run(folder, "gad-slow", steps=90, seed=2, lift=0.05)
    hostile, bare = hostile_run(folder), bare_run(folder)
    return {
        "one": render([good], folder / "one.html"),
        "two": render([good, slow], folder / "two.html"),
        "hostile": render([hostile, good], folder / "hostile.html"),
        "bare": render([bare], folder / "bare.html"),
    }


CARDS = "[...document.querySelectorAll('.card')].length"
COUNT = "document.getElementById('count').textContent"
PLACES = "[...document.querySelectorAll('.card .place')].map((place) => place.firstChild.textContent)"
PROMPTS = "[...document.querySelectorAll('.card .prompt')].map((prompt) => prompt.textContent)"


def set_value(control: str, value: str, event: str) -> str:
    change = f"control.value = {value!r}; control.dispatchEvent(new Event({event!r}));"
    return f"(() => {{ const control = document.getElementById({control!r}); {change} }})()"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("wide", [1280, 390])
@pytest.mark.parametrize("name", ["one", "two", "hostile", "bare"])
def test_every_page_is_quiet_and_fits(
    browser: Browser, pages: dict[str, Path], name: str, wide: int, theme: str
) -> None:
    browser.show(pages[name], wide=wide, theme=theme)
    assert browser.run("document.documentElement.scrollWidth") <= wide
    assert browser.complaints() == []
    light = browser.run("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", light)[:3])) > 600 if theme == "light" else light == "rgb(20, 22, 26)"
    assert len(browser.picture()) > 10_000


def test_hostile_text_does_nothing_with_and_without_the_script(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["hostile"])
    browser.run(set_value("run", "0", "change"))
    for _ in range(6):
        browser.run("document.getElementById('earlier').click()")
    assert "</script><img src=x" in browser.run("document.getElementById('cards').textContent")
    assert browser.run("document.querySelectorAll('img, script:not([type]), main svg[onload], iframe').length") == 1
    assert browser.run("document.title").startswith("hostile, gad-")
    assert browser.complaints() == []


def test_the_policy_stops_code_that_did_get_in(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["one"])
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title=2'}))"
    )
    browser.run("fetch('https://example.org/').catch(() => 0)")
    time.sleep(0.3)
    assert browser.run("document.title") == "gad-2026-11-22-01 · opd report"
    assert [e for e in browser.events if e.get("method") == "Log.entryAdded"], "the policy said nothing"


def test_the_step_slider_moves_through_the_steps(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["one"])
    assert browser.run(COUNT) == "6 samples at step 100" and browser.run(CARDS) == 6
    browser.run(set_value("step", "1", "input"))
    assert browser.run(COUNT) == "6 samples at step 25"
    assert all(place.startswith("step 25 · gad · ") for place in browser.run(PLACES))
    browser.run("document.getElementById('earlier').click()")
    assert browser.run(COUNT) == "6 samples at step 0"
    browser.run("document.getElementById('earlier').click()")
    assert browser.run("document.getElementById('step-shown').textContent") == "0"
    browser.run("document.getElementById('later').click()")
    assert browser.run("location.hash") == "#samples?run=0&step=25"


def test_filter_domain_and_order(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["one"])
    browser.run(set_value("filter", "SKY", "input"))
    assert browser.run(PROMPTS) == ["Explain to a ten year old why the sky is blue, in two sentences."]
    browser.run(set_value("filter", "no such prompt", "input"))
    assert browser.run(CARDS) == 0 and "widen the filter" in browser.run(COUNT)
    browser.run(set_value("filter", "", "input"))
    browser.run(set_value("domain", "math", "change"))
    assert browser.run(CARDS) == 2 and all(" · math" in place for place in browser.run(PLACES))
    browser.run(set_value("domain", "", "change"))
    rewards = (
        "[...document.querySelectorAll('.said.student h4')].map((h) => Number(/reward (\\S+)/.exec(h.textContent)[1]))"
    )
    browser.run(set_value("order", "worst", "change"))
    worst = browser.run(rewards.replace("(\\S+)", "(-?[0-9.]+)"))
    assert worst == sorted(worst) and len(set(worst)) > 1


def test_a_prompt_is_followed_and_its_link_opens_there(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["one"])
    browser.run("document.querySelectorAll('.follow')[2].click()")
    steps = [int(place.split()[1]) for place in browser.run(PLACES)]
    assert steps == [0, 25, 50, 75, 100] and set(browser.run(PROMPTS)) == {browser.run(PROMPTS)[0]}
    link = browser.run("location.hash")
    browser.show(pages["one"], anchor=link)
    assert [int(place.split()[1]) for place in browser.run(PLACES)] == steps
    browser.run("document.querySelector('.follow').click()")
    assert browser.run(CARDS) == 6


def test_two_runs_answer_side_by_side_and_alone(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["two"])
    heads = "[...document.querySelector('.card').querySelectorAll('.said h4')].map((h) => h.firstChild.textContent)"
    assert browser.run(heads) == ["gad-2026-11-22-01", "gad-slow", "teacher"]
    assert browser.run(COUNT) == "12 samples at step 75" and browser.run(CARDS) == 6
    browser.run(set_value("run", "1", "change"))
    assert browser.run(COUNT) == "6 samples at step 75"
    assert browser.run(heads) == ["student", "teacher"]


def test_values_are_read_off_a_chart(browser: Browser, pages: dict[str, Path]) -> None:
    browser.show(pages["one"])
    browser.run("document.getElementById('curves').scrollIntoView()")
    told = browser.run(
        "(() => { const chart = document.querySelector('svg.chart'); const box = chart.getBoundingClientRect();"
        "chart.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 10, clientY: box.top + 40}));"
        "const readout = document.getElementById('readout'); return readout.hidden ? '' : readout.innerText; })()"
    )
    assert re.search(r"step 100\b", told) and re.search(r"accuracy\s+6\d(\.\d)? %", told)


def test_without_its_script_the_page_still_shows_curves_and_samples(browser: Browser, pages: dict[str, Path]) -> None:
    browser.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.show(pages["one"])
        assert browser.run("document.getElementById('controls').hidden") is True
        assert browser.run(CARDS) == 3 and browser.run("document.querySelectorAll('svg.chart').length") > 20
        assert "why the sky is blue" in browser.run("document.getElementById('cards').innerText")
    finally:
        browser.command("Emulation.setScriptExecutionDisabled", value=False)
