"""Accuracy against cost, and the time saved by answer length, as inline SVG that follows the page's text colour."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, TypeAlias

from tokensieve.evaluate import Row
from tokensieve.evaluate.kinds import baseline_methods, plain_name
from tokensieve.report.decision import Decision
from tokensieve.report.extra import needs_report_extra
from tokensieve.report.table import Cost

# Colour-blind safe on light and on dark: Okabe and Ito's, the palest darkened. Shape and dash repeat the distinction.
COLOURS = ("#0084c6", "#d55e00", "#00976d", "#c9649a", "#b98500", "#7a6ff0", "#5f9ea8", "#9a6a3a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
# baselines are grey, with one dash each, in the order of their names
DASHES: Sequence[Any] = ((0, (3, 1, 1, 1, 1, 1)), (0, (6, 2, 1, 2)), (0, (1, 1.5)), (0, (4, 2)))
ORACLE_DASH: Any = (0, (8, 3))
LABELS: dict[Cost, str] = {
    "flops_ratio": "prefill FLOPs, share of the full model",
    "prefill_ms": "prefill time, ms",
    "tokens_average": "visual tokens per question, averaged over the LLM's layers",
}
LEGEND = 60  # characters that fit side by side in a legend
WIDTH, HEIGHT = 5.6, 3.8  # inches, the height without its legend
TEXT, GREY, FRONT = "#010203", "#898989", "#e6b800"
DODGE = 1.5  # points by which curves stand beside each other, so that equal ones do not cover each other
CUT = 0.4  # accuracy: where the lowest value is above it, the axis does not start at 0, and its label states that
Style: TypeAlias = dict[str, Any]


def curve(decision: Decision, cost: Cost) -> str:
    """Return an ``<svg>`` of accuracy in percent against ``cost``, which starts at 0, with intervals as bars.

    The full model is a band across the plot and a point at its cost, baselines are dashed grey lines, methods coloured
    ones. The Pareto front is a broad line behind them. A time has its quartiles as horizontal bars.
    """
    lines = [line for line in decision.lines if getattr(line.row, cost) is not None]
    styles = _styles(decision)
    series = dict.fromkeys(line.row.method for line in lines if line.kind != "full")

    def draw(axes: Any) -> None:
        from matplotlib.transforms import ScaledTranslation

        for line in lines:
            if line.kind == "full":
                _draw_full(axes, line.row, cost)
        if front := decision.front(cost):
            _draw_front(axes, front, cost)
        for number, method in enumerate(series):
            rows = sorted((line.row for line in lines if line.row.method == method), key=lambda row: getattr(row, cost))
            shift = (number - (len(series) - 1) / 2) * DODGE / 72
            beside = axes.transData + ScaledTranslation(shift, 0, axes.figure.dpi_scale_trans)
            _draw_curve(axes, method, rows, cost, {**styles[method], "transform": beside})
        lowest = min((line.row.accuracy_low for line in lines), default=0.0)
        bottom = 0.0 if lowest < CUT else 10 * int(10 * lowest - 0.5)
        axes.set_ylim(bottom, 101)
        axes.set_ylabel("accuracy, %" + (f" (axis starts at {bottom:.0f})" if bottom else ""), color=TEXT)
        axes.set_xlim(left=0)
        axes.set_xlabel(LABELS[cost], color=TEXT)
        if cost == "flops_ratio":
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    return _figure(draw, f"Accuracy against {LABELS[cost]}")


def time_saved(decision: Decision) -> str:
    """Return an ``<svg>`` of the time that an answer saves against its length, or "" if decoding was not measured.

    It shows the best row of each budget and the cheapest row that is not told apart from the full model. A line
    follows from the medians of the table, its band from their quartiles: all low ones, and all high ones.
    """
    chosen = [group.choice.best.row for group in decision.budgets if group.choice is not None]
    chosen += [decision.cheapest] if decision.cheapest is not None and decision.cheapest not in chosen else []
    rows = [row for row in chosen if saved_ms(row, 0) is not None]
    if not rows:
        return ""
    longest = max(32.0, *(2 * (row.break_even_tokens or 0) for row in rows))
    styles = _styles(decision)

    def draw(axes: Any) -> None:
        axes.axhline(0, color=TEXT, lw=1.4, label="as long as the full model")
        for number, row in enumerate(rows):
            style = {name: styles[row.method][name] for name in ("color",)}
            low, middle, high = ([saved_ms(row, n, end) for n in (0, longest)] for end in ("_low", "", "_high"))
            axes.fill_between([0, longest], low, high, alpha=0.15, lw=0, **style)
            dash = ("-", "--", ":", "-.")[number % 4]  # two budgets of one method share a colour
            axes.plot([0, longest], middle, lw=2, ls=dash, label=row.label, **style)
        axes.set_xlim(0, longest)
        axes.set_xlabel("generated tokens", color=TEXT)
        axes.set_ylabel("ms saved per answer (below 0: slower)", color=TEXT)

    return _figure(draw, "Time saved against the length of the answer")


def saved_ms(row: Row, tokens: float, end: str = "") -> float | None:
    """Return the ms that an answer of so many tokens saves, by the medians (``end`` "") or a quartile ("_low")."""
    prefill, decode = getattr(row, f"prefill_speedup{end}"), getattr(row, f"decode_speedup{end}")
    if not (
        prefill and decode and row.prefill_ms and row.decode_ms_per_token and row.prefill_speedup and row.decode_speedup
    ):
        return None
    # a row's median × its speedup is the full model's median
    full_prefill, full_decode = row.prefill_ms * row.prefill_speedup, row.decode_ms_per_token * row.decode_speedup
    return float(full_prefill * (1 - 1 / prefill) + tokens * full_decode * (1 - 1 / decode))


def _styles(decision: Decision) -> dict[str, Style]:
    """Return {method: style}, the same in every plot."""
    methods = dict.fromkeys(line.row.method for line in decision.lines if line.kind == "method")
    styles: dict[str, Style] = {
        method: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "lw": 1.5, "ms": 6}
        for i, method in enumerate(sorted(methods))
    }
    dashes = dict(zip(baseline_methods(), cycle(DASHES), strict=False))
    for line in decision.lines:
        dash = dashes.get(plain_name(line.row.method), ORACLE_DASH)
        styles.setdefault(line.row.method, {"color": GREY, "marker": ".", "lw": 1.4, "ms": 7, "ls": dash})
    return styles


def _draw_full(axes: Any, row: Row, cost: Cost) -> None:
    axes.axhspan(100 * row.accuracy_low, 100 * row.accuracy_high, color=GREY, alpha=0.22, lw=0)
    axes.axhline(100 * row.accuracy, color=TEXT, lw=1.2)
    axes.plot([getattr(row, cost)], [100 * row.accuracy], color=TEXT, marker="*", ms=11, ls="", label="full model")


def _draw_front(axes: Any, rows: Sequence[Row], cost: Cost) -> None:
    """Draw the best accuracy that each cost buys, as steps."""
    front = sorted(rows, key=lambda row: (getattr(row, cost), row.accuracy))
    values, accuracies = [getattr(row, cost) for row in front], [100 * row.accuracy for row in front]
    axes.step(
        values, accuracies, where="post", color=FRONT, alpha=0.5, lw=7, solid_capstyle="round", label="Pareto front"
    )


def _draw_curve(axes: Any, name: str, rows: Sequence[Row], cost: Cost, style: Style) -> None:
    costs, values = [getattr(row, cost) for row in rows], [100 * row.accuracy for row in rows]
    bars = [
        [max(0.0, 100 * (row.accuracy - row.accuracy_low)) for row in rows],
        [max(0.0, 100 * (row.accuracy_high - row.accuracy)) for row in rows],
    ]
    faint = {"color": style["color"], "transform": style["transform"], "alpha": 0.45}
    axes.errorbar(costs, values, bars, _quartiles(rows, cost), fmt="none", elinewidth=0.9, **faint)
    axes.plot(costs, values, label=name, markerfacecolor="none", markeredgewidth=1.6, **style)


def _quartiles(rows: Sequence[Row], cost: Cost) -> list[list[float]] | None:
    ends = [(getattr(row, f"{cost}_low", None), getattr(row, f"{cost}_high", None)) for row in rows]
    if any(low is None or high is None for low, high in ends):
        return None
    values = [getattr(row, cost) for row in rows]
    return [
        [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
    ]


def _figure(draw: Callable[[Any], None], title: str) -> str:
    with needs_report_extra():
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(style):
        figure = Figure(layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.tick_params(colors=TEXT)
        axes.grid(color=GREY, alpha=0.25, lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        handles, labels = axes.get_legend_handles_labels()
        labels = [textwrap.fill(text, LEGEND) for text in labels]  # a spec can be long
        columns = max(1, min(3, LEGEND // max(map(len, labels), default=1)))
        lines = sum(text.count("\n") for text in labels) + math.ceil(len(labels) / columns)
        figure.set_size_inches(WIDTH, HEIGHT + 0.2 * lines)
        place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
        figure.legend(handles, labels, fontsize=9, labelcolor=TEXT, **place)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), title)


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
