"""The page's pieces of HTML: a card per method, messages, the state of a comparison, and a report in a frame."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from tokensieve.demo.jobs import Status
from tokensieve.demo.run import Row
from tokensieve.demo.talk import Conversation
from tokensieve.evaluate.rows import FULL
from tokensieve.measure import Cost, Spread, two_digits

HINT = "Choose methods and a budget, and ask. The full model always answers, too."
LEGEND = (
    "Dark cells were dropped; a yellow line goes round the kept ones. Tinted cells with a dot were merged into one "
    "token, which stands at the dot."
)

# Colours are those of Gradio's theme, so that the cards follow its light and dark modes.
CSS = """
.cards, .talk { --quiet: color-mix(in srgb, var(--body-text-color) 72%, transparent); color: var(--body-text-color); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 215px), 1fr)); gap: 14px; }
.card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px; min-width: 0;
  background: var(--background-fill-primary); overflow-wrap: anywhere; }
.card h3 { margin: 0 0 8px; font-size: 15px; font-weight: 600; }
.card img { width: 100%; border-radius: 4px; display: block; }
.card .answer { font-size: 18px; font-weight: 600; margin: 8px 0; }
.right { color: #00755a; } .wrong { color: #b3261e; }
.dark .right { color: #45c9a4; } .dark .wrong { color: #ff8f85; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 10px; margin: 0; font-size: 13px; }
.card dt { color: var(--quiet); } .card dd { margin: 0; text-align: right; }
.card p { font-size: 13px; margin: 6px 0 0; color: var(--quiet); }
.remarks p { font-size: 14px; margin: 10px 0 0; color: var(--body-text-color); }
.message { border-left: 4px solid #c77700; padding: 8px 12px; border-radius: 4px; font-size: 15px;
  background: var(--background-fill-secondary); color: var(--body-text-color); overflow-wrap: anywhere; }
.message + * { margin-top: 14px; }
.talk { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: 14px; }
.turn { margin: 8px 0; } .turn b { display: block; font-weight: 400; font-size: 14px; color: var(--quiet); }
.turn span { font-size: 17px; font-weight: 600; } .turn small { float: right; color: var(--quiet); }
.report { width: 100%; height: 78vh; border: 1px solid var(--border-color-primary); border-radius: 8px; }
.examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
.examples .grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; }
.examples button { min-width: 0 !important; width: 100% !important; }
progress { width: 100%; height: 12px; accent-color: var(--color-accent); }
footer { display: none !important; }
"""


def cards(rows: Sequence[Row], total: int, *, measuring: bool = False, note: str = "") -> str:
    """Return a card per row, and what is still to come.

    Args:
        rows: the rows so far.
        total: all rows.
        measuring: whether the costs are being measured.
        note: a remark below the cards.
    """
    if len(rows) < total:
        state = f"answering: {len(rows)} of {total}…"
    else:
        state = "measuring the time of all in shared rounds…" if measuring else ""
    timing = next((row.cost.timing_note for row in rows if row.cost is not None), None)
    remarks = [state, f"Note: {timing}." if timing else "", note, LEGEND if rows else ""]
    lines = "".join(f"<p>{escape(remark)}</p>" for remark in remarks if remark)
    return f'<div class="cards">{"".join(map(card, rows))}</div><div class="remarks">{lines}</div>'


def card(row: Row) -> str:
    """Return one method's picture, answer, counts and times."""
    if row.refusal:
        return f'<div class="card"><h3>{escape(row.name)}</h3>{message(row.refusal)}</div>'
    mark, kind = {True: (" ✓", "right"), False: (" ✗", "wrong"), None: ("", "")}[row.right]
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts_of(row))
    notes = "".join(f"<p>{escape(text)}</p>" for text in (row.decision.notes if row.decision else ()))
    return (
        f'<div class="card"><h3>{escape(row.name)}</h3>{picture(row.picture, f"tokens of {row.name}")}'
        f'<div class="answer {kind}">{escape(row.answer) or "(no text)"}{mark}</div><dl>{facts}</dl>{notes}</div>'
    )


def facts_of(row: Row) -> list[tuple[str, str]]:
    """Return names and values of a row's counts and measurements, as texts."""
    decision, facts = row.decision, list[tuple[str, str]]()
    if decision is not None:
        facts.append(("visual tokens", f"{decision.slots} of {decision.total}"))
        # inside the LLM, tokens leave on the way
        if row.tokens_average is not None and round(row.tokens_average) != decision.slots:
            facts.append(("average of its layers", f"{row.tokens_average:.0f}"))
    groups, merged = row.groups
    if groups:
        facts.append(("merged", f"{merged} tokens into {groups} group{'s' * (groups > 1)}"))
    return facts if row.cost is None else [*facts, *_measurements(row.cost)]


def _measurements(cost: Cost) -> list[tuple[str, str]]:
    facts = [("prefill FLOPs", f"{cost.flops_ratio:.0%}"), ("prefill", milliseconds(cost.prefill_ms))]
    if cost.method_ms is not None:
        facts.append(("method alone", milliseconds(cost.method_ms)))
    if cost.method != FULL:
        facts += [("speed, full = 1", str(cost.prefill_speedup)), ("against full", verdict(cost.prefill_speedup))]
    return facts


def milliseconds(time: Spread) -> str:
    """Return a median and its quartiles."""
    low, high = two_digits(time.low), two_digits(time.high)
    return f"{two_digits(time.median)} ({low}–{high}) ms".replace("-", "−")


def verdict(speedup: Spread) -> str:
    """Return a paired speedup in a word; its quartiles must lie on one side of 1."""
    return "faster" if speedup.low > 1 else "slower" if speedup.high < 1 else "not told apart"


def conversation(talk: Conversation) -> str:
    """Return both sides of a conversation, and the tokens behind the method's answers."""
    sides = "".join(
        f'<div class="card"><h3>{escape(side.name)}</h3>'
        + "".join(
            f'<div class="turn"><b>{escape(turn.question)}</b><small>{turn.prefilled} columns</small>'
            f"<span>{escape(turn.answer) or '(no text)'}</span></div>"
            for turn in side.turns
        )
        + "</div>"
        for side in (talk.full, talk.reduced)
    )
    lines = "".join(f"<p>{escape(line)}</p>" for line in talk.explanation())
    kept = (
        f'<div class="card"><h3>kept by {escape(talk.reduced.name)}</h3>{picture(talk.picture(), "kept tokens")}</div>'
    )
    return f'<div class="talk">{sides}{kept}</div><div class="remarks">{lines}</div>'


def picture(image: Image.Image | None, name: str) -> str:
    """Return an image inside the page, so that no file has to be served."""
    if image is None:
        return ""
    out = io.BytesIO()
    image.save(out, "WEBP", quality=85)
    data = base64.b64encode(out.getvalue()).decode("ascii")
    return f'<img alt="{escape(name)}" src="data:image/webp;base64,{data}">'


def message(text: str) -> str:
    """Return one clear line."""
    return f'<div class="message" role="alert">{escape(text)}</div>'


def progress(status: Status) -> str:
    """Return the state of a comparison as a line, with a bar while it runs."""
    if status.state == "idle":
        return ""
    line = {
        "running": f"{status.name}: {status.done:,} of {status.total or '?'} answers; {status.label}",
        "done": f"{status.name} is done; its report is below.",
        "cancelled": f"{status.name} was cancelled after {status.done:,} of {status.total:,} answers: {status.line}.",
        "failed": f"{status.name} failed: {status.line}",
    }[status.state]
    bar = f'<progress max="{max(1, status.total)}" value="{status.done}"></progress>' * (status.state == "running")
    return f'<div class="message" role="status">{escape(line)}{bar}</div>'


def frame(page: str) -> str:
    """Return a report inside the page. It is a page of its own, whose scripts, if it had any, would not run."""
    return f'<iframe class="report" title="report" sandbox="" srcdoc="{escape(page)}"></iframe>'
