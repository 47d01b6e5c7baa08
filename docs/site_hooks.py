"""Hooks of the site (``mkdocs.yml``): pages from outside of ``docs``, the methods in the navigation, GitHub's Markdown.

The same pages are read on a code-hosting page and in the site. There a link may lead to any file of the repository, but
a site holds only its own pages. So each linked file becomes a page of the site, or a file to download.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
NOTEBOOKS = ROOT / "docs" / "notebooks"


def on_config(config: Any) -> Any:
    """List the pages of the methods in the navigation, by stage, as their index does."""
    (methods,) = (entry["Methods"] for entry in config.nav if "Methods" in entry)
    index = (ROOT / "docs" / "methods" / "README.md").read_text("utf-8")
    for section in re.split(r"^## ", index, flags=re.M)[1:]:
        stage = section.partition(":")[0]
        methods.append(
            {stage: [{name: f"methods/{name}.md"} for name in re.findall(r"^\| \[`(.+?)`\]", section, re.M)]}
        )
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that other pages link to and that lie outside of ``docs``, and the notebooks."""
    for path in ("CONTRIBUTING.md", "CHANGELOG.md"):
        files.append(File.generated(config, PAGES[path], content=site_links((ROOT / path).read_text("utf-8"), path)))
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        name = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, name, content=notebook_page(notebook)))
    # a card links to another card: repeat until no page adds one
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        folder = dirname(repository_path(page.src_uri))
        for target in LINK.findall(page.content_string):
            path = normpath(f"{folder}/{target[1]}") if folder else target[1]
            name = source_uri(path)
            if path.startswith("docs/") or not (ROOT / path).is_file() or files.get_file_from_path(name):
                continue
            if name.endswith(".md"):
                files.append(File.generated(config, name, content=source_page(path)))
                waiting.append(files.get_file_from_path(name))
            else:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links out of ``docs`` into links to the site's pages, and write what GitHub reads otherwise."""
    uri = page.file.src_uri
    if not uri.startswith(("contributing", "changelog", "source/", "notebooks/")):  # made above, with such links
        markdown = site_links(markdown, f"docs/{uri}")
    parts = FENCE.split(nested(markdown))
    return "".join(part if number % 2 else plain(part) for number, part in enumerate(parts))


def on_page_content(html: str, **_: Any) -> str:
    """Remove the roles of docstrings in the API: a role names the kind of a link, which this page does not need."""
    html = re.sub(r":\w+:<code>([^<&]+?) &lt;[^<]*&gt;</code>", r"<code>\1</code>", html)
    return re.sub(r":\w+:<code>(?:~[\w.]*\.)?([^<]+)</code>", r"<code>\1</code>", html)


def nested(markdown: str) -> str:
    """Return Markdown in which the content of a list's item is indented by four columns, not by its marker's width."""
    lines, width, in_code = [], 0, False
    for line in markdown.split("\n"):
        if line.startswith("```"):
            in_code, width = not in_code, 0
        item = None if in_code else re.match(r"([-*]|\d+\.) ", line)
        if item:
            width = len(item[0])
        elif line and not line.startswith(" " * width):
            width = 0
        inside = width and not item and line.strip()
        lines.append("    " + line[width:] if inside else line)
    return "\n".join(lines)


def plain(markdown: str) -> str:
    """Return Markdown without what Python-Markdown reads otherwise: ``\\|`` in code, lists right below a paragraph."""
    lines, before = [], ""
    for line in markdown.split("\n"):
        if line.startswith("|"):
            line = re.sub(r"`[^`]+`", lambda code: code[0].replace("\\|", "|"), line)
        item = re.match(r"( *)([-*]|\d+\.) ", line)
        if item and before.strip() and not re.match(r" *([-*]|\d+\.) | {2,}", before):
            lines.append("")
        lines.append(line)
        before = line
    return "\n".join(lines)


def site_links(markdown: str, path: str) -> str:
    """Return the Markdown of a repository's file with its links relative to its page in the site."""
    folder = dirname(path)
    page_folder = dirname(site_uri(path))

    def link(match: re.Match[str]) -> str:
        target = normpath(f"{folder}/{match[2]}") if folder else match[2]
        return f"{match[1]}{relpath(site_uri(target), page_folder or '.')}{match[3]}"

    return LINK.sub(link, markdown)


def site_uri(path: str) -> str:
    """Return the place of a repository's file in the site's sources."""
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return source_uri(path)


def source_uri(path: str) -> str:
    """Return the place of a file from outside of ``docs``: Python files and Markdown become pages."""
    if path in PAGES:
        return PAGES[path]
    return f"source/{path}.md" if path.endswith((".py", ".md", ".sh")) else f"source/{path}"


def repository_path(uri: str) -> str:
    """Return the repository's path of a page, to which its links are relative."""
    known = {page: path for path, page in PAGES.items() if page != "index.md"}
    if uri in known:
        return known[uri]
    return uri.removeprefix("source/").removesuffix(".md") if uri.startswith("source/") else f"docs/{uri}"


def source_page(path: str) -> str:
    """Return the page of a file of the repository: Markdown as it is, code in a block."""
    text = (ROOT / path).read_text("utf-8")
    if path.endswith(".md"):
        return site_links(text, path)
    return f"# `{path}`\n\n```{'python' if path.endswith('.py') else 'bash'}\n{text}```\n"


def notebook_page(notebook: Path) -> str:
    """Return the cells of a notebook as a page; outputs are not stored."""
    cells = []
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cells.append(f"```python\n{text}\n```")
        else:
            cells.append(site_links(text, f"docs/notebooks/{notebook.name}"))
    note = f"*This page is a notebook: [download it]({notebook.name}). It needs no network and no GPU.*"
    return "\n\n".join([cells[0], note, *cells[1:]]) + "\n"
