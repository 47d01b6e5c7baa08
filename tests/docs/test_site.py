"""The site builds strictly, holds every page, and loads nothing from another host."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the site needs the extra docs")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))
import site_hooks  # noqa: E402

LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
IN_CSS = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])((?:https?:)?//[^"')]+)""")


class Loaded(HTMLParser):
    """Collects the addresses that a browser fetches for a page by itself."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in LOADING and values.get("rel") not in ("canonical", "prev", "next"):
            self.addresses.append(values.get(LOADING[tag]) or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 90
    loaded = {address for page in pages for address in Loaded(page).addresses}
    assert len(loaded) > 10
    assert [address for address in loaded if re.match(r"(https?:)?//", address)] == []
    assert [sheet for sheet in site.rglob("*.css") if IN_CSS.search(sheet.read_text("utf-8"))] == []


@pytest.mark.slow
def test_pictures_and_scripts_are_in_the_site(site: Path) -> None:
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its addresses begin at the root of the server
            continue
        for address in Loaded(page).addresses:
            assert address.startswith("data:") or (page.parent / address.partition("?")[0]).exists(), (page, address)


@pytest.mark.slow
def test_every_page_of_docs_is_in_the_site(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / (name.with_name("index.html") if name.stem == "README" else name)).is_file()
    for name in ("contributing", "changelog", "notebooks/first_steps", "source/src/tokensieve/methods/trsm.py"):
        assert (site / f"{name}.html").is_file()


@pytest.mark.slow
def test_the_api_is_there(site: Path) -> None:
    page = (site / "api.html").read_text("utf-8")
    names = re.findall(r"^::: tokensieve\.(\S+)", (ROOT / "docs" / "api.md").read_text("utf-8"), re.M)
    assert len(names) > 20
    assert [name for name in names if f'id="tokensieve.{name}"' not in page] == []


def test_links_lead_to_pages_of_the_site() -> None:
    links = (
        "[a](../CONTRIBUTING.md#style) [b](../src/x.py) [c](methods/trsm.md) [d](notebooks/n.ipynb) [e](https://h/x.md)"
    )
    assert site_hooks.site_links(links, "docs/index.md") == (
        "[a](contributing.md#style) [b](source/src/x.py.md) [c](methods/trsm.md) [d](notebooks/n.md) [e](https://h/x.md)"
    )
    assert site_hooks.site_links("[a](docs/index.md)", "CHANGELOG.md") == "[a](index.md)"
    assert site_hooks.site_links("[a](../card/README.md)", "src/w/README.md") == "[a](../card/README.md.md)"


def test_lists_are_nested_by_four_columns() -> None:
    text = "1. item:\n\n   ```python\n   f()\n   ```\n\n2. other\n   - inner\n\nText.\n\n```yaml\n- a\n  b\n```"
    wide = "1. item:\n\n    ```python\n    f()\n    ```\n\n2. other\n    - inner\n\nText.\n\n```yaml\n- a\n  b\n```"
    assert site_hooks.nested(text) == wide


def test_a_list_below_a_paragraph_and_bars_in_code_are_read_as_on_a_code_hosting_page() -> None:
    assert site_hooks.plain("So:\n- one\n- two") == "So:\n\n- one\n- two"
    assert site_hooks.plain(r"| `int \| None` | a \| b |") == r"| `int | None` | a \| b |"
