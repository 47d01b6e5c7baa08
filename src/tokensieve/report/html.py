"""One self-contained page: the table, the curves, the kept tokens of each method, and the settings."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from PIL import Image

from tokensieve.evaluate import METRICS, Example, OutputError, Results
from tokensieve.evaluate.rows import BLIND, FULL, label
from tokensieve.reduction import Reduction
from tokensieve.report.decision import Decision
from tokensieve.report.extra import needs_report_extra
from tokensieve.report.overlay import overlay
from tokensieve.report.plots import curve, time_saved
from tokensieve.report.referee import GUARD, findings, hidden_losses, tables
from tokensieve.report.remarks import explanations, remarks, warnings
from tokensieve.report.table import (
    ACCURACY,
    BREAK_EVEN,
    COSTS,
    FLOPS,
    SPEEDUP,
    TOKENS,
    Column,
    Cost,
    percent,
    type_column,
)

LIMIT = 2_000_000  # bytes of pictures on a page
TYPES = 7  # question types side by side
LISTED = 6  # rows that the summary of an example names
Crop = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Drawing:
    """The kept tokens of one row on an example's image, and the model's answer."""

    caption: str
    image: Image.Image
    answer: str
    right: bool


@dataclass(frozen=True)
class ShownExample:
    """One example of the page.

    Attributes:
        summary: whether the full model and the methods are right, in words.
        order: examples with a lower number come first.
    """

    question: str
    answers: tuple[str, ...]
    pictures: tuple[Drawing, ...]
    summary: str
    order: int


def write_report(results: Results, folder: Path, *, crop: Crop | None = None, command: str = "") -> Path:
    """Write ``folder/report.html``; an older page stays until the new one is complete.

    Args:
        results: the results of ``compare``.
        folder: folder of the results, with the images of the examples.
        crop: returns the model's view of an image (see :func:`~tokensieve.report.overlay.as_seen`).
        command: the command line, for the page.

    Raises:
        OutputError: the page cannot be written (a full disk).
        MissingExtra: the ``report`` extra is not installed.
    """
    path, text = folder / "report.html", render(results, folder, crop=crop, command=command)
    part = path.with_suffix(".part")
    try:
        part.write_text(text, "utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}; results.json is kept") from error
    return path


def render(results: Results, folder: Path, *, crop: Crop | None = None, command: str = "") -> str:
    """Return the page as text, without scripts and without external files."""
    with needs_report_extra():
        from jinja2 import Environment
        from markupsafe import Markup

    decision = Decision(results)
    examples = [_shown(example, results, folder, crop, decision) for example in results.examples]
    examples.sort(key=lambda shown: shown.order)
    guarded = (GUARD,) if any(line.row.referee and line.row.referee.guards for line in decision.lines) else ()
    costs = (FLOPS, SPEEDUP, BREAK_EVEN) if decision.measured else ()
    accuracy = (*ACCURACY[:-1], *guarded, *costs, ACCURACY[-1])
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["id"] = id
    template = page.from_string(files("tokensieve.report").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        title=f"Visual-token reduction on {results.settings.get('model', 'this model')}",
        results=results,
        decision=decision,
        best=[group.choice.best for group in decision.budgets if group.choice],
        warnings=warnings(decision),
        remarks=[*hidden_losses(decision), *remarks(decision)],
        explanations=explanations(decision),
        accuracy=accuracy,
        costs=COSTS,
        columns=dict.fromkeys((*accuracy[:-1], *(COSTS if decision.measured else ()))),
        measured=decision.measured,
        types=_type_tables(decision),
        findings=findings(decision),
        referee_tables=tables(decision),
        curves=[Markup(svg) for svg in _plots(decision)],
        examples=examples,
        uris=_data_uris([picture for shown in examples for picture in shown.pictures]),
        skipped=results.skipped,
        percent=percent,
        command=command,
    )


def _plots(decision: Decision) -> list[str]:
    """Return accuracy against each cost, against the tokens, and the time saved by answer length."""
    tokens: Cost = "tokens_average"
    costs = dict.fromkeys([*decision.costs, tokens])
    return list(filter(None, [*(curve(decision, cost) for cost in costs), time_saved(decision)]))


def _type_tables(decision: Decision) -> list[list[Column]]:
    """Return the columns of the question types in tables of equal width that fit a screen."""
    counts = {score.type: score.samples for line in decision.lines for score in line.row.types}
    columns = [type_column(kind, samples) for kind, samples in counts.items()]
    tables = math.ceil(len(columns) / TYPES)
    width = math.ceil(len(columns) / tables) if tables else 1
    return [[TOKENS, *columns[start : start + width]] for start in range(0, len(columns), width)]


def _shown(example: Example, results: Results, folder: Path, crop: Crop | None, decision: Decision) -> ShownExample:
    """Draw the example for every row in the order of the table, except where the tokens form no grid."""
    with Image.open(folder / example.image) as opened:
        image = opened.convert("RGB")
    image = crop(image) if crop else image
    metric = METRICS[results.settings["metric"]]
    place = {(line.row.method, line.row.keep): number for number, line in enumerate(decision.lines)}
    kept = sorted(example.kept, key=lambda entry: place.get((entry["method"], entry["keep"]), len(place)))
    right: dict[str, bool] = {}
    pictures = []
    for entry in kept:
        caption, answer = label(entry["method"], entry["keep"]), str(entry["prediction"])
        right[caption] = metric(answer, example.answers) > 0
        if not entry["reductions"]:  # the blind row
            continue
        reduction = Reduction.from_json(entry["reductions"][0])
        if reduction.grid is not None or reduction.whole:
            pictures.append(Drawing(caption, overlay(image, reduction, side=384), answer, right[caption]))
    answers, full, blind = tuple(dict.fromkeys(example.answers)), right.pop(FULL, True), right.pop(BLIND, None)
    return ShownExample(example.question, answers, tuple(pictures), *_summary(right, full, blind))


def _summary(right: dict[str, bool], full: bool, blind: bool | None) -> tuple[str, int]:
    """Return an example's summary in words, and its place: questions on which the methods disagree come first.

    Args:
        right: {method and budget: whether its answer is right}, without the full model.
        full: whether the full model's answer is right.
        blind: whether the model is right without the image; ``None`` without a blind row.
    """
    count = sum(right.values())
    start = f"full model {'right' if full else 'wrong'}; " + "right without the image; " * bool(blind)
    if count == len(right):
        return start + "all methods right", 1 if not full else 2
    wrong = [caption for caption, is_right in right.items() if not is_right]
    if count == 0:
        return start + "all methods wrong", 1 if full else 3
    listed = ", ".join(wrong) if len(wrong) <= LISTED else f"{len(wrong)} of {len(right)} rows"
    return start + f"wrong: {listed}", 0 if full else 1


def _data_uris(pictures: Sequence[Drawing]) -> dict[int, str]:
    """Return {id of a picture: data URI}, at the largest size at which all fit on the page."""
    uris: dict[int, str] = {}
    for side, quality in ((384, 82), (288, 75), (192, 65), (96, 50)):
        uris = {id(picture): _data_uri(picture.image, side, quality) for picture in pictures}
        if sum(map(len, uris.values())) <= LIMIT:
            break
    return uris


def _data_uri(image: Image.Image, side: int, quality: int) -> str:
    small, out = image.copy(), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(out, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii")
