"""Make ``architecture.svg``: the packages in the layers of the import contract, the engine opened, and their imports.

``python docs/make_architecture.py`` reads the layers from ``pyproject.toml``, and the imports from the source with
grimp, which import-linter installs. Imports that follow from two others are left out, so that the arrows stay readable.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from textwrap import wrap

import grimp

try:
    import tomllib
except ImportError:  # Python 3.10; import-linter brings it
    import tomli as tomllib

DOCS = Path(__file__).parent
SVG = DOCS / "architecture.svg"
ROOT, ENGINE = "tokensieve", "tokensieve.engine"
STAGES = ("connector", "decoder", "encoder", "fusion")
CONTENTS = {
    "cli": "the typer app, without torch",
    "commands": "one file per command",
    "tune": "search with a proof",
    "reproduce": "published rows, run again",
    "report": "HTML, plots, overlays",
    "serve": "the OpenAI-compatible server",
    "batch": "many rows, on Ray Data",
    "evaluate": "data, metrics, comparisons",
    "load": "load tests of servers",
    "check": "the equivalence checks (laws)",
    "measure": "FLOPs, latency, memory",
    "train": "adapters, PuMer, bundled models",
    "loading": "checkpoints, with options",
    "vllm": "the plug-in for vLLM",
    "harness": "the plug-ins for evaluation harnesses",
    "reference": "bundled models and benchmark",
    "engine": "the hooks on a live model",
    "fusion": "METER, checkpoint conversion",
    "models": "one file per model family",
    "methods": "one file per method",
    "tokens": "the input of a method",
    "crossmodal": "the same for PuMer",
    "reduction": "the decision of a method",
    "budget": "how many tokens to keep",
    "ops": "tensor maths, torch only",
    "images": "checks of pixels",
    "tally": "tokens before and after",
    "jsonl": "files of JSON lines",
    "errors": "Refusal",
}
INK, MUTED, LINE, ARROW = "#1f2933", "#52606d", "#9aa5b1", "#3e6fa8"
FILLS = {"engine": "#fdebc8", "": "#eaf1f8"}
STYLE = f"""text{{font-family:system-ui,"Segoe UI",Helvetica,Arial,sans-serif;font-size:13px;fill:{INK}}}
.name{{font-weight:600}}.small{{font-size:12px;fill:{MUTED}}}.head{{font-size:16px;font-weight:600}}
.arrow{{fill:none;stroke:{ARROW};stroke-width:1.3;marker-end:url(#tip)}}"""
BESIDE = 24  # pixels between the boxes of a row: room for arrows that pass
MOST = 4  # boxes in a row
Edges = set[tuple[str, str]]


@dataclass
class Box:
    """One package or folder, in pixels."""

    lines: list[str]
    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height


def contract_rows() -> list[list[str]]:
    """Return the layers of the import contract, top first; each is a list of packages without the root's name."""
    contracts = tomllib.loads((DOCS.parent / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [re.findall(rf"{ROOT}\.(\w+)", layer) for layer in layers]


def imports(graph: grimp.ImportGraph, package: str) -> Edges:
    """Return the imports between the direct children of a package, without those that follow from others."""
    children = graph.find_children(package)

    def child_of(module: str) -> str | None:
        return next((c for c in children if module == c or module.startswith(c + ".")), None)

    pairs = {(child_of(a), child_of(b)) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)}
    edges = {(_last(a), _last(b)) for a, b in pairs if a and b and a != b}
    return {(a, b) for a, b in edges if b not in _reachable(a, edges - {(a, b)})}


def levels(names: list[str], edges: Edges, beside: tuple[str, ...] = ()) -> list[list[str]]:
    """Return the names in rows, top first: each stands below everything that imports it.

    Args:
        beside: names that share a row.
    """
    row_of = dict.fromkeys(names, 0)
    for _ in names:  # the longest path has fewer steps than there are names; a circle ends here, too
        for a, b in sorted(edges):
            row_of[b] = max(row_of[b], row_of[a] + 1)
        row_of |= dict.fromkeys(beside, max((row_of[name] for name in beside), default=0))
    rows = [[name for name in sorted(names) if row_of[name] == row] for row in sorted(set(row_of.values()))]
    return [row[first : first + MOST] for row in rows for first in range(0, len(row), MOST)]


def drawn(rows: list[list[str]], texts: dict[str, tuple[str, str]], edges: Edges, left: float, top: float,
          width: float, gap: float) -> tuple[list[str], dict[str, Box], float]:  # fmt: skip
    """Return the SVG elements of boxes in rows and of the arrows between them, the boxes, and the lowest pixel.

    Args:
        texts: of each box, its name and the smaller text below the name.
    """
    boxes: dict[str, Box] = {}
    row_of: dict[str, int] = {}
    y = top
    for number, row in enumerate(rows):
        each = (width - BESIDE * (len(row) - 1)) / len(row)
        lines = {name: [texts[name][0], *wrap(texts[name][1], int(each / 6.6), break_long_words=False)] for name in row}
        height = 14 + 16 * max(map(len, lines.values()))
        for place, name in enumerate(row):
            boxes[name] = Box(lines[name], left + place * (each + BESIDE), y, each, height)
            row_of[name] = number
        y += height + gap
    gaps = {
        (a, b): _gaps((boxes[a].middle + boxes[b].middle) / 2, rows[row_of[a] + 1 : row_of[b]], boxes) for a, b in edges
    }
    ports = _ports(gaps, boxes)
    taken: dict[tuple[int, float], set[int]] = defaultdict(set)
    arrows = []
    for (a, b), passed in sorted(gaps.items(), key=lambda item: (len(item[1]), item[0])):
        places = list(enumerate(passed, row_of[a] + 1))
        lane = next(k for k in range(99) if all(k not in taken[place] for place in places))
        (start, end), points = ports[a, b], []
        for number, x in places:
            taken[number, x].add(lane)
            x += lane * (7 if x > left + width / 2 else -7)
            row_box = boxes[rows[number][0]]
            points += [(x, row_box.y - gap / 3), (x, row_box.bottom + gap / 3)]
        path = _curve([(start, boxes[a].bottom), *points, (end, boxes[b].y - 2)])
        arrows.append(f'<path class="arrow" d="{path}"><title>{a} imports {b}</title></path>')
    return [*arrows, *(_box(name, box) for name, box in boxes.items())], boxes, y - gap


def svg() -> str:
    """Return the picture as text."""
    graph = grimp.build_graph(ROOT, cache_dir=None)
    rows = contract_rows()
    texts = {name: (name, CONTENTS.get(name, "")) for row in rows for name in row}
    between = {(a, b) for a, b in imports(graph, ROOT) if a in texts and b in texts}
    house, boxes, house_end = drawn(rows, texts, between, 42, 62, 300, 20)
    files = {}
    for child in graph.find_children(ENGINE):
        name, inside = _last(child), sorted(map(_last, graph.find_children(child)))
        files[name] = (f"{name}/" if inside else f"{name}.py", ", ".join(inside))
    edges = imports(graph, ENGINE)
    opened, _, end = drawn(levels(list(files), edges, STAGES), files, edges, 430, 112, 430, 34)
    engine, bottom = boxes["engine"], max(house_end, end + 20) + 50
    panel = (
        f'<rect x="400" y="70" width="490" height="{end - 50:g}" rx="8" fill="#fffaf0" stroke="{LINE}"/>'
        f'<path d="M{engine.x + engine.width:g} {engine.y + engine.height / 2:g}H400" stroke="{LINE}" '
        'stroke-dasharray="4 3" fill="none"/>'
        '<text class="head" x="420" y="96">engine, opened</text>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {bottom:g}" width="900" height="{bottom:g}">',
            "<title>The packages of Tokensieve and their imports</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{ARROW}"/></marker></defs>',
            f'<rect width="900" height="{bottom:g}" rx="10" fill="#ffffff"/>',
            '<text class="head" x="42" y="36">tokensieve: imports run downwards</text>',
            panel,
            *house,
            *opened,
            f'<text class="small" x="42" y="{bottom - 18:g}">An arrow is an import. Imports that follow from two '
            "others are left out.</text>",
            "</svg>\n",
        ]
    )


def _reachable(start: str, edges: Edges) -> set[str]:
    reached, waiting = set(), [start]
    while waiting:
        here = waiting.pop()
        following = {b for a, b in edges if a == here} - reached
        reached |= following
        waiting += following
    return reached


def _gaps(x: float, rows: list[list[str]], boxes: dict[str, Box]) -> list[float]:
    """Return where an arrow from ``x`` passes each of the rows: the nearest place beside or between the boxes."""
    passed = []
    for row in rows:
        first, last = boxes[row[0]], boxes[row[-1]]
        inner = [(boxes[a].x + boxes[a].width + boxes[b].x) / 2 for a, b in pairwise(row)]
        x = min([first.x - 10, *inner, last.x + last.width + 10], key=lambda gap: abs(gap - x))
        passed.append(x)
    return passed


def _ports(gaps: dict[tuple[str, str], list[float]], boxes: dict[str, Box]) -> dict[tuple[str, str], list[float]]:
    """Spread the ends of the arrows over the bottom and the top of each box, so that neighbours do not cross."""
    ends: dict[tuple[str, str], list[float]] = {edge: [] for edge in sorted(gaps)}
    for side in (0, 1):
        at = Counter(edge[side] for edge in ends)
        used = Counter[str]()

        def aim(edge: tuple[str, str], side: int = side) -> float:
            return gaps[edge][-side] if gaps[edge] else boxes[edge[1 - side]].middle

        for edge in sorted(ends, key=aim):
            box = boxes[edge[side]]
            used[edge[side]] += 1
            ends[edge].append(box.x + box.width * used[edge[side]] / (at[edge[side]] + 1))
    return ends


def _curve(points: list[tuple[float, float]]) -> str:
    """Return a path through the points, vertical at each of them."""
    path = f"M{points[0][0]:.0f} {points[0][1]:.0f}"
    for (x, y), (to_x, to_y) in pairwise(points):
        path += f"C{x:.0f} {(y + to_y) / 2:.0f} {to_x:.0f} {(y + to_y) / 2:.0f} {to_x:.0f} {to_y:.0f}"
    return path


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _box(name: str, box: Box) -> str:
    fill = FILLS.get(name, FILLS[""])
    shape = f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" rx="6" '
    texts = "".join(
        f'<text class="{"small" if number else "name"}" x="{box.middle:.0f}" y="{box.y + 19 + 16 * number:.0f}" '
        f'text-anchor="middle">{escape(line)}</text>'
        for number, line in enumerate(box.lines)
    )
    return f'{shape}fill="{fill}" stroke="{LINE}"/>{texts}'


if __name__ == "__main__":
    SVG.write_text(svg(), "utf-8")
