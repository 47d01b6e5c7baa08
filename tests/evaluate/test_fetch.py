"""Images given as URLs: refused unless allowed, fetched once, with limits."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import ClassVar

import pytest
from PIL import Image

from tokensieve.errors import DataError
from tokensieve.evaluate import fetch, load_data
from tokensieve.evaluate.provenance import sample_key


def photo() -> bytes:
    file = BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, "PNG")
    return file.getvalue()


class Web(BaseHTTPRequestHandler):
    """A server of one image and of every mistake a server makes."""

    calls: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.calls[self.path] += 1
        getattr(self, f"do_{self.path[1:].split('.')[0]}")()

    def send(self, content: bytes, kind: str = "image/png", length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def redirect(self, place: str) -> None:
        self.send_response(302)
        self.send_header("Location", place)
        self.end_headers()

    def do_photo(self) -> None:
        self.send(photo())

    def do_binary(self) -> None:
        self.send(photo(), "application/octet-stream")

    def do_page(self) -> None:
        self.send(b"<html>", "text/html; charset=utf-8")

    def do_garbage(self) -> None:
        self.send(b"no image at all")

    def do_gone(self) -> None:
        self.send_error(404)

    def do_moved(self) -> None:
        self.redirect("/photo.png")

    def do_circle(self) -> None:
        self.redirect("/circle")

    def do_file(self) -> None:
        self.redirect("file:///etc/hostname")

    def do_ftp(self) -> None:
        self.redirect("ftp://127.0.0.1/photo.png")

    def do_cut(self) -> None:
        self.send(photo(), length=10_000)

    def do_large(self) -> None:
        self.send(b"\0" * 3000)

    def do_slow(self) -> None:
        self.send(b"", length=100)
        for _ in range(20):
            self.wfile.write(b"\0")
            self.wfile.flush()
            time.sleep(0.05)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def web(tmp_path, monkeypatch) -> Iterator[str]:
    """Return the URL of the server; fetched images go into a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Web.calls.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def row(url: str) -> dict[str, str]:
    return {"image": url, "question": "what?", "answer": "x"}


def test_a_url_is_refused_unless_fetching_is_allowed(write, web):
    with pytest.raises(DataError, match=r"line 2: http.*not fetched; --fetch-images allows it") as caught:
        load_data(write([row("0.png"), row(f"{web}/photo.png")]))
    assert "http://" in str(caught.value)  # not mangled into a file name
    assert not Web.calls


@pytest.mark.parametrize("name", ["photo.png", "binary", "moved"])
def test_an_image_is_fetched_when_it_is_opened_and_only_once(write, web, name):
    rows = [row(f"{web}/{name}"), row(f"{web}/{name}"), row("0.png")]
    first, second, third = load_data(write(rows), fetch_images=True)
    assert not Web.calls
    assert first.image == second.image != third.image
    assert sample_key(first) != sample_key(third)
    assert first.open().getpixel((0, 0)) == (255, 0, 0)
    assert second.open().size == (30, 20)
    assert set(Web.calls.values()) == {1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "the server answers 404 .Not Found"),
        ("page", "not an image; the server sends text/html"),
        ("garbage", "not an image"),
        ("circle", "the server answers 302"),
        ("file", "the server answers 302"),
        ("ftp", "cannot be fetched .*ftp"),
        ("cut", "cannot be fetched|ended .* bytes early"),
        ("large", "larger than 0 MB"),
        ("slow", "not complete after|timed out"),
    ],
)
def test_what_a_server_does_wrong_is_one_line_with_file_and_line(write, web, monkeypatch, name, message):
    monkeypatch.setattr(fetch, "MAX_BYTES", 2000)
    monkeypatch.setattr(fetch, "TIMEOUT", 0.3 if name == "slow" else 60)
    (sample,) = load_data(write([row(f"{web}/{name}")]), fetch_images=True)
    for _ in range(2):  # a failure is not kept
        with pytest.raises(DataError, match=message) as caught:
            sample.open()
        assert str(caught.value).startswith(sample.where)
        assert "\n" not in str(caught.value)
    assert Web.calls[f"/{name}"] >= 2


def test_no_server(write, web):
    (sample,) = load_data(write([row("http://127.0.0.1:9/x.png")]), fetch_images=True)
    with pytest.raises(DataError, match=r"line 1: http://127\.0\.0\.1:9/x\.png: cannot be fetched"):
        sample.open()


@pytest.mark.parametrize("url", ["http://", "http://[::1", "https://exa mple.org/x.png"])
def test_a_url_that_is_none(write, web, url):
    (sample,) = load_data(write([row(url)]), fetch_images=True)
    with pytest.raises(DataError, match="line 1: http"):
        sample.open()


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://x.org/a.png", "s3://bucket/a.png"])
def test_other_schemes_are_refused_even_when_fetching(write, url):
    with pytest.raises(DataError, match=f"line 1: {url}: {url.split(':')[0]}:// is not supported"):
        load_data(write([row(url)]), fetch_images=True)
