"""Write ``docs/methods``: a page for every registered method, and an index.

``python docs/make_methods.py`` reads the methods' dataclasses and docstrings (idea, ``Args:``, ``Cost:``, ``Paper:``,
``Official code:``), the numbers that papers report (``src/tokensieve/reproduce/published.json``), and the measured
results (``docs/results.jsonl``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_type_hints

from make_results import DOCS, Entry, ledger, wished

from tokensieve.commands.method_page import STAGES, Docstring, meaning_of, type_of
from tokensieve.methods import Method, MethodInfo, list_methods
from tokensieve.methods.registry import find
from tokensieve.reproduce.published import PUBLISHED

FOLDER = DOCS / "methods"
MADE = "<!-- made by docs/make_methods.py -->"


def pages() -> dict[str, str]:
    """Return {file name: text} of all pages in ``docs/methods``."""
    known, measured = list_methods(), ledger()
    published = json.loads(PUBLISHED.read_text("utf-8"))
    texts = {f"{info.name}.md": _page(info, published, measured) for info in known}
    return {"README.md": "\n".join(_index(known)) + "\n"} | {
        name: _with_links(text, [info.name for info in known]) for name, text in texts.items()
    }


def _with_links(text: str, names: list[str]) -> str:
    """Replace double backticks by single ones, or by a link if they hold the name of a method; remove roles."""

    def shown(match: re.Match[str]) -> str:
        return f"[`{match[1]}`]({match[1]}.md)" if match[1] in names else f"`{match[1]}`"

    return re.sub(r"``([^`\n]+)``", shown, re.sub(r":\w+:`~?([^`]+)`", r"``\1``", text))


def _index(known: list[MethodInfo]) -> Iterator[str]:
    yield from (MADE, "# Methods", "")
    yield (
        "N is the number of visual tokens of an image, K of those that stay, D their width, M the words of the prompt, "
        "L the positions of the prompt. Costs come on top of the model's own run. See also [specs and budgets]"
        "(../specs.md), and [all results](../results.md) on the bundled benchmark."
    )
    for stage, meaning in STAGES.items():
        mine = [info for info in known if info.stage == stage]
        if mine:
            yield from ("", f"## {stage.capitalize()}: {meaning}", "", "| method | what it does | cost | paper |")
            yield "|---|---|---|---|"
        for info in mine:
            docstring = Docstring.of(find(info.name))
            cost = docstring.remarks.get("Cost", "not stated").rstrip(".").replace("``", "`")
            title = info.title.rstrip(".").replace("``", "`")
            yield f"| [`{info.name}`]({info.name}.md) | {title} | {cost} | {_paper_link(info)} |"


def _paper_link(info: MethodInfo) -> str:
    number = info.paper.removeprefix("arXiv:")
    return f"[{number}](https://arxiv.org/abs/{number})" if number != info.paper else info.paper


def _page(info: MethodInfo, published: dict[str, Any], measured: list[Entry]) -> str:
    method = find(info.name)
    docstring = Docstring.of(method)
    paper = docstring.remarks.get("Paper")
    lines = [MADE, f"# `{info.name}`", "", *_spaced(docstring.text)]
    lines += [f"- **Stage:** {info.stage}, {STAGES[info.stage]}."]
    lines += [f"- **Cost:** {docstring.remarks.get('Cost', 'not stated.')}"]
    lines += [f"- **Training:** {'made to be trained with' if info.trained else 'none needed'}."]
    lines += [f"- **Paper:** {f'{paper} ' if paper else ''}{_paper_link(info)}"]
    lines += [f"- **Code:** [{method.__module__}](../../src/{method.__module__.replace('.', '/')}.py)"]
    lines += ["", "## Parameters", "", *_parameters(method, docstring)]
    lines += ["", "## Evidence", "", *_needs(info)]
    if "Official code" in docstring.remarks:
        remark = docstring.remarks["Official code"]
        lines += ["", "## Official code", "", remark[0].upper() + remark[1:]]
    lines += _published(info.name, published)
    lines += _bundled(info.name, measured)
    return "\n".join(lines) + "\n"


def _spaced(paragraphs: tuple[str, ...]) -> Iterator[str]:
    for paragraph in paragraphs:
        yield from (paragraph, "")


def _parameters(method: type[Method], docstring: Docstring) -> Iterator[str]:
    hints = get_type_hints(method)
    if not fields(method):
        yield "None."
        return
    yield from ("| name | type | default | meaning |", "|---|---|---|---|")
    for field in fields(method):
        meaning = escaped(meaning_of(field.name, docstring))
        yield f"| `{field.name}` | `{escaped(type_of(hints[field.name]))}` | `{field.default!r}` | {meaning} |"


def escaped(text: str) -> str:
    """Return a text for a cell of a table."""
    return text.replace("|", "\\|")


def _needs(info: MethodInfo) -> Iterator[str]:
    """List the requested evidence: nothing else is computed."""
    meanings, requested = Docstring.of(type(info.needs)).arguments, info.needs.requested()
    for name in requested:
        yield f"- `{name}={getattr(info.needs, name)!r}`: {meanings[name]}"
    if info.stage == "fusion":
        yield "The text and image tokens of a layer, and its queries and keys."
    elif not requested:
        yield "None: the method reads the tokens only."


def _published(name: str, published: dict[str, Any]) -> list[str]:
    """Return the claims of papers about this method, and the tables that hold it, as printed there."""
    lines, claims = [], [entry for entry in published["claims"] if entry["method"] == name]
    for table in published["tables"]:
        rows = [
            [tokens if spec == name else f"{tokens} (`{spec}`)", *cells]
            for spec, tokens, *cells in table["rows"]
            if name in _names(spec)
        ]
        if rows:
            full = [["576 (all)", *table["full"]]] if table["full"] else []
            lines += ["", f"{table['title']}. Source: {table['source']} {table['note']}".rstrip(), ""]
            lines += ["| tokens | " + " | ".join(table["columns"]) + " |", "|---|" + "---|" * len(table["columns"])]
            lines += [
                "| " + " | ".join("–" if cell is None else str(cell) for cell in row) + " |" for row in full + rows
            ]
    if not lines and not claims:
        return []
    origin = "read from the papers named, not measured here."
    head = f"{published['model']}; {origin}" if lines else origin.capitalize()
    shown = [f"- {entry['claim']} Source: {entry['source']}" for entry in claims]
    return ["", "## Published results", "", head, *([""] if shown else []), *shown, *lines]


def _bundled(name: str, measured: list[Entry]) -> list[str]:
    """Return its results on the bundled benchmark, alone or with another method."""
    rows = [entry for entry in measured if name in _names(entry.method)]
    if not rows:
        return []
    lines = ["", "## On the bundled benchmark", ""]
    lines += [
        f"{rows[0].samples:,} questions; accuracy in per cent, and points above or below `random` with about as many "
        "tokens (paired by question), each with its 95 % interval. [All results](../results.md).",
        "",
        "| method | budget | tokens kept | on average | accuracy | against random |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        budget = "its own" if row.keep is None else wished(row.keep) + " average" * (row.budget == "average")
        if row.chance is None:
            against = "–"
        else:
            against = "{:+.1f} ({:+.1f} to {:+.1f})".format(
                *(100 * part for part in (row.chance.difference, row.chance.low, row.chance.high))
            )
        counts = f"{row.tokens_after:.3g} | {row.tokens_average:.3g}"
        lines += [f"| `{row.method}` | {budget} | {counts} | {row.accuracies} | {against} |"]
    return lines


def _names(spec: str) -> list[str]:
    """Return the methods in a spec, without their arguments."""
    return [part.partition("(")[0].strip() for part in re.split(r"\s\+\s", spec)]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for name, text in pages().items():
        (FOLDER / name).write_text(text, "utf-8")
