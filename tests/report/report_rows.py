"""Results written by hand, in the form of ``compare``: the scores are chosen, and the intervals follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tokensieve.evaluate import Example, Question, Results, Row, Skipped, TypeScore, VsRandom, wilson
from tokensieve.reduction import Reduction

TYPES = ("colour", "where")  # the first and the second half of the questions
TOKENS = 144


@dataclass(frozen=True)
class Draft:
    """A row and its scores by seed and question."""

    row: Row
    scores: tuple[tuple[float, ...], ...]


def row(
    method: str,
    keep: float | None,
    accuracy: float | tuple[float, float],
    *,
    samples: int = 400,
    shift: int = 0,
    seeds: int = 1,
    **changes: Any,
) -> Draft:
    """Return a row with this accuracy, or with one per type.

    The right answers are the first ones of each type, moved on by ``shift`` questions. So rows of one shift differ in
    one direction only, and rows of another shift in both.
    """
    after = TOKENS if keep is None else keep if isinstance(keep, int) else round(TOKENS * keep)
    share = after / TOKENS
    scores: list[float] = []
    for part in accuracy if isinstance(accuracy, tuple) else (accuracy, accuracy):
        right = round(part * samples / 2)
        ordered = [1.0] * right + [0.0] * (samples // 2 - right)
        scores += ordered[-shift:] + ordered[:-shift]
    mean = sum(scores) / samples
    low, high = wilson(sum(scores), samples)
    fields: dict[str, Any] = {
        "method": method, "keep": keep, "tokens_before": TOKENS, "tokens_after": after, "tokens_average": after,
        "samples": samples, "accuracy": mean, "accuracy_low": low, "accuracy_high": high,
        "flops_ratio": share, "prefill_ms": 20 * share, "prefill_speedup": 1 / share, "method_ms": 0.3,
        "decode_ms_per_token": 2.0, "peak_activation_mb": 4 * share, "kv_mb": share,
        "decode_speedup": 1.0, "decode_speedup_low": 0.9, "decode_speedup_high": 1.1,
        "prefill_speedup_low": 0.9 / share, "prefill_speedup_high": 1.1 / share, "break_even": "at once",
        "break_even_tokens": 0.0, "break_even_low": 0.0, "break_even_high": 0.0,
    }  # fmt: skip
    return Draft(Row(**{**fields, **changes}), (tuple(scores),) * seeds)


def unmeasured(draft: Draft) -> Draft:
    """Return the row without costs."""
    costs = ("flops", "prefill", "method_ms", "decode", "peak", "kv", "break")
    names = [name for name in vars(draft.row) if name.startswith(costs)]
    return replace(draft, row=replace(draft.row, **dict.fromkeys(names)))


def results(
    drafts: Sequence[Draft],
    *,
    types: Sequence[str] = TYPES,
    predictions: Sequence[dict[str, str]] = ({},),
    folder: Path | None = None,
    skipped: Sequence[Skipped] = (),
    **settings: Any,
) -> Results:
    """Return results of these rows, the full model first.

    Args:
        types: names of the question types; the first half of the questions has the first one.
        predictions: {method: answer} of each example; "red" is the default and right.
        folder: where the example's image is written; without it there are no examples.
    """
    count = len(drafts[0].scores[0])
    questions = tuple(Question(str(i), types[i * len(types) // count], i) for i in range(count))
    plain = Results(True, {}, {}, tuple(draft.row for draft in drafts), questions, tuple(d.scores for d in drafts))
    examples = () if folder is None else tuple(_example(i, p, plain.rows, folder) for i, p in enumerate(predictions))
    return replace(
        plain,
        environment={"torch": "2.13.0", "threads": 2},
        settings={"model": "reference", "metric": "exact", "keep_means": "final", **settings},
        rows=tuple(_compared(plain, row, types) for row in plain.rows),
        skipped=tuple(skipped),
        examples=examples,
    )


def _compared(plain: Results, row: Row, types: Sequence[str]) -> Row:
    full, *others = plain.rows
    scores = plain.scores[plain.rows.index(row)][0]
    changes: dict[str, Any] = {} if row is full else _gap(plain, row, full)
    random = [r for r in others if r.method == "random" and r.tokens_average == row.tokens_average]
    if random and row.method not in ("full", "random"):
        gap = plain.paired(row, random[0])
        changes["random"] = VsRandom(random[0].tokens_average, random[0].accuracy, gap.difference, gap.low, gap.high)
    scored = []
    for kind in types:
        right = [score for score, q in zip(scores, plain.questions, strict=True) if q.type == kind]
        gap_of_type = {} if row is full else _gap(plain, row, full, kind)
        low, high = wilson(sum(right), len(right))
        scored.append(TypeScore(kind, len(right), sum(right) / len(right), low, high, **gap_of_type))
    return replace(row, types=tuple(scored) if any(types) else (), **changes)


def _gap(plain: Results, row: Row, full: Row, kind: str | None = None) -> dict[str, Any]:
    gap = plain.paired(row, full, kind)
    bounds = {"difference_low": gap.low, "difference_high": gap.high}
    return {"difference": gap.difference, **bounds, "difference_p": gap.p}


def _example(number: int, predictions: dict[str, str], rows: Sequence[Row], folder: Path) -> Example:
    Image.radial_gradient("L").convert("RGB").save(folder / f"{number}.png")
    kept = tuple(
        {
            "method": row.method,
            "keep": row.keep,
            "prediction": predictions.get(row.method, "red"),
            "reductions": [Reduction(TOKENS, torch.arange(int(row.tokens_after)), grid=(12, 12)).to_json()],
        }
        for row in rows
    )
    return Example(str(number), f"{number}.png", f"what colour is <b>it</b> in {number}?", ("red",), kept)
