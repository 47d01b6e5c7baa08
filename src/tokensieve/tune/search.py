"""``tune``: the cheapest configuration that keeps the accuracy, proven on questions that the search did not see."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.evaluate.compare import check_inputs
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Journal
from tokensieve.evaluate.lock import locked
from tokensieve.evaluate.plan import Settings
from tokensieve.evaluate.provenance import predictions_setup
from tokensieve.evaluate.table import clusters
from tokensieve.tune.asking import Asker
from tokensieve.tune.costs import CostKind, Limit
from tokensieve.tune.race import Progress
from tokensieve.tune.result import TuneResult, write_json
from tokensieve.tune.space import KEEPS, METHODS, space
from tokensieve.tune.steps import Search

SPEC_FILE, RESULT = "best.json", "tune.json"
SEARCH_SHARE = 0.4  # of the questions; the others prove the choice


def tune(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    max_drop: float,
    output: str | Path,
    max_latency: str | None = None,
    cost: CostKind = "flops",
    methods: Sequence[str] = METHODS,
    keeps: Sequence[Budget] = KEEPS,
    trials: int | None = 120,
    seed: int = 0,
    settings: Settings | None = None,
    spec_file: str | Path | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Find the cheapest configuration whose accuracy drops by at most ``max_drop``, with a proof on held-out questions.

    The search sees 40 % of the images. All configurations answer the same few questions, the better half answers twice
    as many, and so on (successive halving). The other images judge up to three configurations, the safest first, each
    by the one-sided 95 % bound of its drop, paired by question, until one fails. The last that holds is chosen.

    Each answer is appended to ``output/predictions.jsonl`` at once; the same call continues from there, and a call with
    another bound, other methods or more questions uses what is there. The answer is in ``output/tune.json``.

    Args:
        model, processor, samples: as for :func:`tokensieve.evaluate.compare`; the model generates answers.
        max_drop: largest drop of accuracy against the unreduced model, in (0, 0.5]: 0.01 is one point.
        output: folder of the answers.
        max_latency: largest prefill time, ``"60%"`` of the unreduced model's or ``"12ms"``; times are then measured.
        cost: cheapest in "flops" of a prefill, or in its measured "latency".
        methods, keeps, trials, seed: the configurations, see :func:`tokensieve.tune.space.space`. The seed also splits
            the questions.
        settings: prompt, metric, answer length, batch size, budget scope and separators.
        spec_file: path of the spec file of the chosen configuration; by default ``best.json`` in ``output``.
        progress: called with (answers so far, answers planned, label).

    Raises:
        Refusal: a bad bound, an unknown method or metric, no method that this model can run, fewer than two images.
        DataError: no image can be read.
        ResumeError: ``output`` holds the answers of another model or prompt.
        OutputError: another process writes to ``output``, or a file cannot be written.
    """
    settings = settings or Settings()
    check_bound(max_drop)
    if cost not in get_args(CostKind):
        raise Refusal(f"cost must be 'flops' or 'latency'; got {cost!r}")
    limit = None if max_latency is None else Limit.of(max_latency)
    if trials is not None and trials < 1:
        raise Refusal(f"trials must be at least 1; got {trials}")
    candidates = space(methods, keeps, trials=trials, seed=seed)
    check_inputs(model, processor, samples, settings)
    if not model.can_generate():
        raise Refusal(f"a search needs a model that generates answers; got {type(model).__name__}")
    held_images, search_images = split(samples, seed)
    output, setup = Path(output), predictions_setup(model, processor, settings)
    with locked(output, "search"):
        asker = Asker(model, processor, samples, settings, Journal(output, setup))
        search = Search(asker, max_drop, max_latency, limit, cost, seed, progress)
        result = search.run(candidates, search_images, [sample for image in held_images for sample in image])
        if result.chosen is None:
            (output / SPEC_FILE).unlink(missing_ok=True)  # of an earlier call with a milder bound
        else:
            path = Path(spec_file or output / SPEC_FILE)
            write_json(path, search.spec_file(result).to_json())
            result = replace(result, spec_file=str(path))
        write_json(output / RESULT, result.to_json())
    return result


def check_bound(max_drop: float) -> float:
    """Return a largest drop of accuracy unchanged if it is one.

    Raises:
        Refusal: naming the allowed values.
    """
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not 0 < max_drop <= 0.5:
        raise Refusal(f"max_drop is a share of the questions above 0, up to 0.5 (1% is 0.01); got {max_drop!r}")
    return max_drop


def split(samples: Sequence[Sample], seed: int) -> tuple[list[list[Sample]], list[list[Sample]]]:
    """Return the held-out questions and those of the search, in random order, grouped by image.

    Images that a question shows together, directly or through further questions, are one group, and so are files with
    equal content: no image is in both parts.

    Raises:
        Refusal: there are fewer than two groups.
    """
    by_image: dict[int, list[Sample]] = {}
    for sample, number in zip(samples, clusters(samples).tolist(), strict=True):
        by_image.setdefault(number, []).append(sample)
    images = list(by_image.values())
    if len(images) < 2:
        got = f"{len(samples)} question{'s' * (len(samples) != 1)} about {len(images)}"
        together = "; images that questions show together count as one" * any(len(s.images) > 1 for s in samples)
        raise Refusal(f"a search needs questions about at least two images, one of them held out; got {got}{together}")
    random.Random(seed).shuffle(images)
    searched, count = [images.pop()], len(samples)
    while len(images) > 1 and sum(map(len, searched)) + len(images[-1]) / 2 <= SEARCH_SHARE * count:
        searched.append(images.pop())
    return images, searched
