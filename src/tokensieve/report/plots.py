"""Accuracy against cost, one curve per method, as inline SVG that follows the page's text colour."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import cycle
from typing import Any, Literal, TypeAlias

from tokensieve.report.extra import needs_report_extra
from tokensieve.report.table import Row, baseline_methods, plain_name

Cost: TypeAlias = Literal["flops_ratio", "tokens_after"]

# Colour-blind safe on light and on dark: Okabe and Ito's, the palest darkened. Shape and dash repeat the distinction.
COLOURS = ("#0084c6", "#d55e00", "#00976d", "#c9649a", "#b98500", "#7a6ff0", "#5f9ea8", "#9a6a3a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
# baselines are grey, with one dash each, in the order of their names
DASHES: Sequence[Any] = ((0, (3, 1, 1, 1, 1, 1)), (0, (6, 2, 1, 2)), (0, (1, 1.5)), (0, (4, 2)))
ORACLE_DASH: Any = (0, (8, 3))
LABELS: dict[Cost, str] = {
    "flops_ratio": "prefill FLOPs, share of the full model",
    "tokens_after": "visual tokens per image",
}
LEGEND_COLUMNS = 3
TEXT, GREY = "#010203", "#898989"


def curve(rows: Sequence[Row], cost: Cost) -> str:
    """Return an ``<svg>`` of accuracy in percent against ``cost``, with the rows' intervals as error bars.

    The full model is a band across the plot, baselines are dashed grey lines, methods coloured ones.
    """
    with needs_report_extra():
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": cost, "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(style):
        curves = _by_method(rows, cost)
        figure = Figure(figsize=(5.6, 3.8 + 0.2 * -(-len(curves) // LEGEND_COLUMNS)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for name, points in curves.items():
            if points[0]["kind"] == "full":
                _draw_full(axes, points[0])
            else:
                _draw_curve(axes, name, sorted(points, key=lambda row: row[cost]), cost, _coloured(rows))
        _format(axes, cost)
        if axes.has_data():
            figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False, fontsize=9, labelcolor=TEXT)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), f"Accuracy against {LABELS[cost]}")


def _by_method(rows: Sequence[Row], cost: Cost) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row[cost] is not None:
            groups.setdefault(row["method"], []).append(row)
    return groups


def _coloured(rows: Sequence[Row]) -> list[str]:
    """Return the specs that get a colour, in order of appearance."""
    return list(dict.fromkeys(row["method"] for row in rows if row["kind"] == "method"))


def _draw_full(axes: Any, row: Row) -> None:
    axes.axhspan(100 * row["accuracy_low"], 100 * row["accuracy_high"], color=GREY, alpha=0.22, lw=0)
    axes.axhline(100 * row["accuracy"], color=TEXT, lw=1.4, label="full model")


def _draw_curve(axes: Any, name: str, points: list[Row], cost: Cost, coloured: list[str]) -> None:
    values = [100 * row["accuracy"] for row in points]
    bars = [[100 * (row["accuracy"] - row["accuracy_low"]) for row in points],
            [100 * (row["accuracy_high"] - row["accuracy"]) for row in points]]  # fmt: skip
    bars = [[max(0.0, bar) for bar in side] for side in bars]
    if name in coloured:
        index = coloured.index(name)
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "lw": 2, "ms": 5.5}
    else:
        dashes = dict(zip(baseline_methods(), cycle(DASHES), strict=False))
        style = {"color": GREY, "marker": ".", "lw": 1.4, "ms": 6, "ls": dashes.get(plain_name(name), ORACLE_DASH)}
    axes.errorbar([row[cost] for row in points], values, bars, label=name, capsize=2, elinewidth=1, **style)


def _format(axes: Any, cost: Cost) -> None:
    axes.set_xlabel(LABELS[cost], color=TEXT)
    axes.set_ylabel("accuracy, %", color=TEXT)
    axes.tick_params(colors=TEXT)
    axes.grid(color=GREY, alpha=0.25, lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    if cost == "flops_ratio":
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _inline(svg: str, title: str) -> str:
    """Return the bare ``<svg>`` element, scalable and titled, with its text in the page's colour and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace("xlink:href", "href").replace(TEXT, "currentColor")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
