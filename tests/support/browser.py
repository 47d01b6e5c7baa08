"""A headless Chromium at any width, driven over the pipe of the DevTools protocol (JSON that ends in a zero byte)."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATIENCE = 240  # seconds to wait for an answer: other tests may keep the machine busy
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Chromium reads commands from descriptor 3 and writes answers to descriptor 4. Both pipes are copied to high numbers
# first, as one of them can have the other's place.
LAUNCH = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 20) for number in sys.argv[1:3]]
for place, pipe in zip((3, 4), pipes):
    os.dup2(pipe, place)
os.execv(sys.argv[3], sys.argv[3:])
"""

# Returns a list of faults: the page scrolls sideways, or a text is outside of the window, of its table cell, or of an
# ancestor that clips it. Texts are measured by their own boxes, as an element's box does not show what flows over it.
FAULTS = """(() => {
  const faults = [], width = document.documentElement.clientWidth;
  const name = text => JSON.stringify(text.trim().slice(0, 40));
  if (document.scrollingElement.scrollWidth > width)
    faults.push(`the page is ${document.scrollingElement.scrollWidth} px wide`);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; text = texts.nextNode();) {
    if (!text.data.trim() || !text.parentElement.checkVisibility({ contentVisibilityAuto: true })) continue;
    const range = document.createRange();
    range.selectNodeContents(text);
    const boxes = [...range.getClientRects()].filter(box => box.width);
    for (let parent = text.parentElement; parent; parent = parent.parentElement) {
      const clips = getComputedStyle(parent).overflowX !== "visible" || ["TD", "TH", "svg"].includes(parent.tagName);
      const frame = parent === document.documentElement ? { left: 0, right: width } : parent.getBoundingClientRect();
      if ((clips || parent === document.documentElement)
          && boxes.some(box => box.left < frame.left - 1 || box.right > frame.right + 1))
        faults.push(`${name(text.data)} is cut off by <${parent.tagName.toLowerCase()}>`);
    }
  }
  return faults;
})()"""


class Browser:
    """One page of a headless Chromium; use it in a ``with`` block."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        program = [CHROMIUM, *flags, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        launcher = [sys.executable, "-c", LAUNCH, str(commands), str(answers), *program]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(launcher, pass_fds=(commands, answers), **quiet)
        os.close(commands)
        os.close(answers)
        self._buffer, self._number, self._session = b"", 0, ""
        self._events: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(
            self._write, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer.get("method", ""))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], PATIENCE)
            assert ready, "Chromium does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "Chromium has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def open(self, page: Path, width: int, height: int = 800, *, dark: bool = False, media: str = "screen") -> None:
        """Load a file in a window of ``width`` × ``height`` px."""
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._events.append(self._next().get("method", ""))

    def resize(self, width: int, height: int = 800) -> None:
        """Set the width of the layout; a window of headless Chromium cannot be narrower than 500 px by itself."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, script: str) -> Any:
        """Return the JSON value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def faults(self, widths: Sequence[int]) -> dict[int, list[str]]:
        """Return {width: faults} of the open page where it has any, with every ``<details>`` unfolded."""
        self.evaluate("document.querySelectorAll('details').forEach(folded => { folded.open = true })")
        found = {}
        for width in widths:
            self.resize(width)
            if faults := self.evaluate(FAULTS):
                found[width] = faults
        return found

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **(self._whole() if whole else {}))
        file.write_bytes(base64.b64decode(picture["data"]))

    def _whole(self) -> dict[str, Any]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}
