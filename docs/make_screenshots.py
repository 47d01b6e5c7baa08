"""Make the pictures of ``demo.md``: the page in a browser. Needs Chromium and the environment of `make test-demo`."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from shutil import which
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).parent
PORT, PATIENCE = 7867, 120  # seconds
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 900}


def main() -> None:
    """Start the page, and take its pictures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tokensieve", "demo", "--no-browser", "--port", str(PORT)]
        server = subprocess.Popen(command, cwd=folder)
        try:
            _wait(server)
            with sync_playwright() as driver:
                browser = driver.chromium.launch(executable_path=which("chromium"), args=["--no-sandbox"])
                _pictures(browser)
                browser.close()
        finally:
            server.terminate()
            server.wait(30)


def _pictures(browser: Any) -> None:
    page = _open(browser, WIDE)
    page.locator(".examples button").nth(1).click()
    page.wait_for_timeout(1000)
    page.click("#ask")
    _answered(page)
    _save(page, "demo-ask.png", clip={"x": 0, "y": 0, "width": 1280, "height": 1130})
    page.get_by_role("tab", name="Talk").click()
    page.click("#talk")
    page.wait_for_selector("#conversation .turn >> nth=1")
    question = page.get_by_label("Question", exact=True).locator("visible=true")
    question.fill("where is the umbrella?")
    question.press("Enter")
    page.wait_for_selector("#conversation .turn >> nth=3")
    page.wait_for_timeout(500)
    _save(page, "demo-talk.png", clip={"x": 0, "y": 0, "width": 1280, "height": 820})
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare")
    page.wait_for_selector("#report iframe", timeout=600_000)
    page.wait_for_timeout(1500)
    _save(page, "demo-compare.png", clip={"x": 0, "y": 0, "width": 1280, "height": 1000})
    phone = _open(browser, NARROW)
    phone.click("#ask")
    _answered(phone)
    _save(phone, "demo-phone.png")


def _open(browser: Any, size: dict[str, int]) -> Any:
    page = browser.new_page(viewport=size)
    page.set_default_timeout(PATIENCE * 1000)
    page.goto(f"http://127.0.0.1:{PORT}")
    page.wait_for_selector("#ask")
    page.wait_for_timeout(1000)
    return page


def _answered(page: Any) -> None:
    """Wait until the costs of all methods are there, and the page stands still."""
    page.wait_for_selector("#result >> text=prefill FLOPs")
    page.wait_for_timeout(1500)


def _save(page: Any, name: str, **options: Any) -> None:
    picture = Image.open(io.BytesIO(page.screenshot(full_page="clip" in options, **options)))
    picture.convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE).save(DOCS / name, optimize=True)


def _wait(server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}", timeout=10).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError("the page did not start")


if __name__ == "__main__":
    main()
