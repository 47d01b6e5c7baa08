"""Results written by hand, in the form of ``compare``."""

from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from tokensieve.evaluate import Example, Results, Row, TypeScore, VsRandom
from tokensieve.reduction import Reduction

KINDS = ("colour", "where")


def row(method: str, keep: int | float | None, accuracy: float, samples: int = 400, **changes: float | None) -> Row:
    after = 144 if keep is None else keep if isinstance(keep, int) else round(144 * keep)
    share = after / 144
    fields = {
        "method": method, "keep": keep, "tokens_before": 144, "tokens_after": after, "tokens_average": after,
        "samples": samples, "accuracy": accuracy, "accuracy_low": accuracy - 0.04, "accuracy_high": accuracy + 0.03,
        "flops_ratio": share, "prefill_ms": 20 * share, "prefill_speedup": 1 / share, "method_ms": 0.3,
        "decode_ms_per_token": 2.0, "peak_activation_mb": 4 * share, "kv_mb": share,
    }  # fmt: skip
    return Row(**{**fields, **changes})


def results(rows: list[Row], by_type: list[tuple[float, ...]] | None = None, folder: Path | None = None) -> Results:
    """Return results of these rows; with a folder, write one example image there."""
    scores = by_type or [(r.accuracy,) * len(KINDS) for r in rows]
    rows = [
        replace(
            r,
            types=tuple(TypeScore(k, 200, a, a - 0.05, a + 0.05) for k, a in zip(KINDS, line, strict=True)),
            difference=r.accuracy - rows[0].accuracy,
            difference_low=-0.1,
            difference_high=0.1,
            random=_chance(r, rows),
        )
        for r, line in zip(rows, scores, strict=True)
    ]
    examples: tuple[Example, ...] = ()
    if folder is not None:
        Image.radial_gradient("L").convert("RGB").save(folder / "example.png")
        kept = tuple(
            {
                "method": r.method,
                "keep": r.keep,
                "prediction": "red",
                "reductions": [Reduction(144, torch.arange(int(r.tokens_after)), grid=(12, 12)).to_json()],
            }
            for r in rows
        )
        examples = (Example("0", "example.png", "what colour is <b>it</b>?", ("red",), kept),)
    environment, settings = {"torch": "2.13.0", "threads": 2}, {"model": "reference", "metric": "exact"}
    return Results(True, environment, settings, tuple(rows), examples=examples)


def _chance(row: Row, rows: list[Row]) -> VsRandom | None:
    """Compare with the random row of equal tokens, with an interval of ± five points."""
    random = [r for r in rows if r.method == "random" and r.tokens_after == row.tokens_after]
    if not random or row.method in ("full", "random"):
        return None
    gap = row.accuracy - random[0].accuracy
    return VsRandom(random[0].tokens_average, random[0].accuracy, gap, gap - 0.05, gap + 0.05)
