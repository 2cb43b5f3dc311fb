"""A page in headless Chromium for tests, driven over the debugging pipe of the browser, so that no driver is needed."""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TIMEOUT = 60  # seconds for one answer, on a busy machine

# The contrast (WCAG 2) of every element that has text of its own with the nearest background behind it.
CONTRASTS = """
(() => {
  const channel = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = text => {  // rgb() counts to 255, color() to 1
    const numbers = text.match(/[\\d.]+/g).slice(0, 3).map(Number);
    return text.startsWith("color(") ? numbers : numbers.map(v => v / 255);
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (color !== "rgba(0, 0, 0, 0)") return parse(color);
    }
    return [1, 1, 1];
  };
  const written = element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  const elements = [...document.querySelectorAll("body *:not(script):not(svg *)")].filter(written);
  return JSON.stringify(elements.map(element => {
    const sides = [light(parse(getComputedStyle(element).color)), light(behind(element))];
    return (Math.max(...sides) + 0.05) / (Math.min(...sides) + 0.05);
  }));
})()
"""


class Browser:
    """A page in headless Chromium over `--remote-debugging-pipe`: JSON messages, each ended by a zero byte."""

    def __init__(self, to_browser: int, from_browser: int):
        self.to_browser, self.from_browser, self.buffer = to_browser, from_browser, b""
        self.numbers, self.session, self.events = itertools.count(1), None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.from_browser], [], [], TIMEOUT)[0], f"no answer from Chromium for {TIMEOUT} s"
            piece = os.read(self.from_browser, 1 << 20)
            assert piece, "Chromium has ended"
            self.buffer += piece
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, file: Path) -> None:
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, expression: str):
        """Returns the value of a JavaScript expression; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Waits until the expression is true, because decompressing and searching take time."""
        end = time.monotonic() + TIMEOUT
        while not self.evaluate(f"!!({expression})"):
            assert time.monotonic() < end, f"not true within {TIMEOUT} s: {expression}"
            time.sleep(0.02)

    def set_scheme(self, scheme: str) -> None:
        """Sets the colour scheme that the reader prefers, "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def set_size(self, width: int, height: int, *, mobile: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def errors(self) -> list[dict]:
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in bad]

    def requests(self) -> list[str]:
        sent = (event for event in self.events if event.get("method") == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Starts a browser with an empty page and its profile in this directory. Skips the test if there is no Chromium."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium on PATH")
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --hide-scrollbars"
    flags += " --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
    its_input, our_output, our_input, its_output = map(_moved_up, (*os.pipe(), *os.pipe()))
    quiet = _moved_up(os.open(os.devnull, os.O_RDWR))
    wiring = [(os.POSIX_SPAWN_DUP2, its_input, 3), (os.POSIX_SPAWN_DUP2, its_output, 4)]
    wiring += [(os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)]
    command = [program, *flags.split(), f"--user-data-dir={profile}"]
    own = os.environ | {"HOME": str(profile)}  # for its crash reports
    process = os.posix_spawn(program, command, own, file_actions=wiring, setpgroup=0)
    for end in (its_input, its_output, quiet):
        os.close(end)
    try:
        yield Browser(our_output, our_input)
    finally:
        os.close(our_output)
        os.close(our_input)
        os.killpg(process, signal.SIGKILL)  # the browser and its child processes, which are a process group
        os.waitpid(process, 0)


def _moved_up(end: int) -> int:
    """Duplicates the descriptor to one above 9, so that passing it as 3 or 4 replaces no other."""
    moved = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return moved
