"""Stability of a method's decisions: the overlap of the kept places when the image moves a little, and by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Answer, Journal
from tokensieve.evaluate.pictures import Picture, open_picture
from tokensieve.evaluate.plan import Entry
from tokensieve.evaluate.referee import chance_overlap, jaccard
from tokensieve.evaluate.rows import FULL
from tokensieve.evaluate.runner import Report, Runner
from tokensieve.evaluate.verdict import Overlap

if TYPE_CHECKING:
    from tokensieve.evaluate.compare import Comparison

SHARE = 0.02  # of the shorter side: an image moves by so much, and by at least one pixel
KEY = f"moved {SHARE:.0%}"  # in the keys of moved samples in the journal


def pixels(size: tuple[int, int]) -> int:
    """Return by how many pixels an image of this size moves."""
    return max(1, round(SHARE * min(size)))


def moved(picture: Picture) -> Image.Image:
    """Return an image moved right and down by a few pixels; the first column and row fill the gap."""
    image = open_picture(picture)
    gap = pixels(image.size)
    grown = np.pad(np.asarray(image), ((gap, 0), (gap, 0), (0, 0)), mode="edge")
    return Image.fromarray(grown[: image.height, : image.width])


def moved_sample(sample: Sample) -> Sample:
    """Return the same question about moved images."""
    pictures = tuple(partial(moved, picture) for picture in sample.images)
    return replace(sample, image=pictures if isinstance(sample.image, tuple) else pictures[0])


def overlap(
    samples: Sequence[Sample],
    keys: Mapping[str, str],
    moved_keys: Mapping[str, str],
    runs: Sequence[Mapping[str, Answer]],
) -> Overlap | None:
    """Return the overlap of the kept places of a row on the examples; ``None`` if no decision is recorded.

    Args:
        samples: the examples.
        keys, moved_keys: {sample id: key of its answer}, of the image and of the moved image.
        runs: the row's answers by key, one mapping per seed; the first holds the moved images, too.
    """
    by_shift, by_seed, chances, answers = list[float](), list[float](), list[float](), list[bool]()
    for sample in samples:
        first, after = runs[0].get(keys[sample.id]), runs[0].get(moved_keys[sample.id])
        if first is None or after is None or first.before != after.before:
            continue
        places = [_kept(run.get(keys[sample.id])) for run in runs]
        kept, kept_after = places[0], _kept(after)
        if kept is None or kept_after is None:
            continue
        by_shift.append(jaccard(kept, kept_after))
        by_seed += [jaccard(a, b) for a, b in combinations(places, 2) if a is not None and b is not None]
        chances.append(chance_overlap(len(kept) / first.before))
        answers.append(first.text == after.text)
    if not by_shift:
        return None
    widest = max(pixels(image.size) for sample in samples for image in sample.open_all())
    return Overlap(
        images=len(by_shift),
        pixels=widest,
        shift=float(np.mean(by_shift)),
        seeds=float(np.mean(by_seed)) if by_seed else None,
        chance=float(np.mean(chances)),
        answers=float(np.mean(answers)),
    )


def row_overlaps(
    comparison: Comparison,
    entries: Sequence[Entry],
    samples: Sequence[Sample],
    keys: Mapping[str, str],
    journal: Journal,
    report: Report,
) -> list[Overlap | None]:
    """Answer the examples with moved images, by the first run of every method, and compare the kept places.

    Args:
        samples: the examples.
        keys: {sample id: key in the journal}.
        report: receives the current run.
    """
    moved_keys = {sample.id: f"{keys[sample.id]} {KEY}" for sample in samples}
    moved_samples = [moved_sample(sample) for sample in samples]
    models = [model for model in (comparison.model, comparison.trained) if model is not None]
    overlaps = list[Overlap | None]()
    runners = []
    if samples:
        answerers = [comparison.answerer(model, moved_samples, moved_keys, moved_keys.keys()) for model in models]
        runners = [Runner(comparison, answerer, journal, optional=True) for answerer in answerers]
    for entry in entries:
        run = entry.runs[0]
        if not runners or not run.stages or entry.method == FULL:  # the oracle and the blind row have no stages
            overlaps.append(None)
            continue
        runners[entry.trained].complete(run, entry.keep, lambda label, _: report(f"{label}, image moved", 0))
        overlaps.append(overlap(samples, keys, moved_keys, [journal.answers[seed.key] for seed in entry.runs]))
    return overlaps


def _kept(answer: Answer | None) -> set[int] | None:
    """Return the places that a recorded decision kept; padded slots repeat a place."""
    return None if answer is None or answer.reduction is None else set(answer.reduction["anchors"])
