"""One self-contained page: the table, the curves, the kept tokens of each method, and the settings."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from tokensieve.evaluate import METRICS, Example, OutputError, Results
from tokensieve.reduction import Reduction
from tokensieve.report.extra import needs_report_extra
from tokensieve.report.overlay import overlay
from tokensieve.report.plots import curve
from tokensieve.report.remarks import remarks
from tokensieve.report.table import COLUMNS, Row, as_rows, label

LIMIT = 2_000_000  # bytes of pictures on a page
Crop = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Picture:
    """The kept tokens of one row on an example's image, and the model's answer."""

    caption: str
    image: Image.Image
    answer: str
    right: bool


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

    rows = as_rows(results)
    examples = [(example, _pictures(example, results, folder, crop)) for example in results.examples]
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["id"] = id
    template = page.from_string(files("tokensieve.report").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(
        title=f"Visual-token reduction on {results.settings.get('model', 'this model')}",
        results=results,
        rows=rows,
        full=next((row for row in rows if row["kind"] == "full"), None),
        columns=COLUMNS,
        types=list(dict.fromkeys(kind for row in rows for kind in row["by_type"])),
        curves=[Markup(curve(rows, cost)) for cost in _costs(rows)],
        remarks=remarks(rows),
        examples=examples,
        uris=_data_uris([picture for _, pictures in examples for picture in pictures]),
        command=command,
    )


def _costs(rows: Sequence[Row]) -> list[Any]:
    measured = any(row["flops_ratio"] is not None for row in rows)
    return ["flops_ratio", "tokens_after"] if measured else ["tokens_after"]


def _pictures(example: Example, results: Results, folder: Path, crop: Crop | None) -> list[Picture]:
    """Draw the example for every row, except where the tokens form no grid."""
    with Image.open(folder / example.image) as opened:
        image = opened.convert("RGB")
    image = crop(image) if crop else image
    score = METRICS[results.settings["metric"]]
    pictures = []
    for kept in example.kept:
        reduction = Reduction.from_json(kept["reductions"][0])
        if reduction.grid is not None or reduction.whole:
            answer = str(kept["prediction"])
            picture = overlay(image, reduction, side=384)
            pictures.append(Picture(label(kept), picture, answer, score(answer, example.answers) > 0))
    return pictures


def _data_uris(pictures: Sequence[Picture]) -> dict[int, str]:
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
