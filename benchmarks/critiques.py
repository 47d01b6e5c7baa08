"""Three published critiques of visual-token reduction, tried on the bundled model, each with p-values.

1. *Random selection beats or equals most methods at mild budgets* (UniPruneBench: 6 of 8 methods at 66.7 and 77.8 %
   pruned).
2. *Plain downsampling equals reduction on easy questions, and falls behind on hard ones* (VTC-Bench: hard are the
   questions that downsampling gets wrong).
3. *Renumbered positions ruin questions about places* (GAP: RefCOCO 56.1 to 15.3, and 51.4 with the positions restored).

The script prints for each critique whether it holds here: on another model it may be otherwise. The p-values are
McNemar's exact ones, paired by question with whole images exchanged, and corrected by Holm within a critique; seeds of
`random` are joined by Rüger's rule. An interrupted run continues from the answers in the output folder.

    python benchmarks/critiques.py                              # 1,040 questions, and 1,200 for the third critique
    python benchmarks/critiques.py --scenes 20 --place-scenes 40    # fewer
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from script import parser_of, run_script
from tokensieve.evaluate import Results, Row, Sample, compare, environment, load_data
from tokensieve.evaluate.compare import Comparison
from tokensieve.evaluate.intervals import in_points, paired_difference
from tokensieve.evaluate.plan import Settings
from tokensieve.evaluate.referee import exact_p, holm
from tokensieve.reference import load

MILD = (0.33, 0.22)  # two thirds and 78 % of the tokens dropped
METHODS = ("vtc-cls", "fastervlm", "visionzip", "prumerge+", "vispruner", "divprune", "trsm", "fastv(layer=1)")
PLACE_METHODS = ("vtc-cls", "divprune", "scope", "random(seed=0)", "uniform")
PLACES = ("where", "point")  # question types about places
ALPHA = 0.05
EQUAL = 0.05  # rows whose interval ends below 5 points are called equal; a wide interval decides nothing


@dataclass(frozen=True)
class Test:
    """One comparison of two rows on some questions.

    Attributes:
        name: the row and its budget, and the questions.
        difference, low, high: in 0 … 1, with the 95 % interval.
        p, p_holm: McNemar's exact p-value, and after Holm's correction over the tests of the critique.
    """

    name: str
    questions: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float = 1.0

    def __str__(self) -> str:
        points = in_points(self.difference, self.low, self.high, sign="+")
        return f"  {self.name:44} {points:>26}   p {self.p:<8.2g} Holm {self.p_holm:<8.2g} n = {self.questions}"


@dataclass(frozen=True)
class Finding:
    """Outcome of one critique on this model.

    Attributes:
        verdict: "holds", "does not hold" or "undecided", when most tests show neither a difference nor equality.
        reason: the counts behind it.
    """

    critique: str
    verdict: str
    reason: str
    tests: tuple[Test, ...]

    def __str__(self) -> str:
        return "\n".join([self.critique, *map(str, self.tests), f"  => {self.verdict.upper()} here: {self.reason}", ""])


def verdict(supporting: int, opposing: int, total: int) -> str:
    """Return the verdict on a claim about most rows."""
    return "holds" if supporting > total / 2 else "does not hold" if opposing > total / 2 else "undecided"


def above(test: Test) -> bool:
    """Return whether the row is above the other one after Holm's correction."""
    return test.difference > 0 and test.p_holm < ALPHA


def not_above(test: Test) -> bool:
    """Return whether the row is below the other one, or at most :data:`EQUAL` above it by its interval."""
    return test.high <= EQUAL and not above(test)


def scores_of(results: Results, row: Row) -> np.ndarray:
    """Return the scores of a row, `[seeds, questions]`."""
    return np.array(results.scores[results.rows.index(row)], dtype=float)


def paired(results: Results, row: Row, other: Row, chosen: np.ndarray, name: str, base: Results | None = None) -> Test:
    """Compare two rows on the chosen questions, `[questions]` bool; ``base`` holds the other row if results do not."""
    clusters = np.array([question.cluster for question in results.questions])[chosen]
    scores, others = scores_of(results, row)[:, chosen], scores_of(base or results, other)[:, chosen]
    gap = paired_difference(scores, others, clusters)
    p = exact_p(scores, others, clusters)
    assert p is not None  # the benchmark's answers are right or wrong
    return Test(name, int(chosen.sum()), gap.difference, gap.low, gap.high, p)


def corrected(tests: Sequence[Test]) -> tuple[Test, ...]:
    return tuple(replace(test, p_holm=p) for test, p in zip(tests, holm([test.p for test in tests]), strict=True))


def random_beats_most(results: Results) -> Finding:
    """Count the rows that random beats or equals at equal final budgets."""
    everything = np.full(len(results.questions), True)
    tests = corrected(
        [
            paired(results, results.row(name, keep), results.row("random", keep), everything, f"{name} at {keep:.0%}")
            for keep in MILD
            for name in METHODS
        ]
    )
    level, better = sum(map(not_above, tests)), sum(map(above, tests))
    return Finding(
        "1. Random selection beats or equals most methods at mild budgets (row minus random)",
        verdict(level, better, len(tests)),
        f"{better} of {len(tests)} rows are above random, {level} are below it or at most 5 points above",
        tests,
    )


def downsampling(results: Results, name: str) -> Iterator[Finding]:
    """Compare every method with a downsampled row: on all questions, and on those where it is wrong, against random.

    On the questions that downsampling gets wrong it has 0 % itself, by construction, so that random is the yardstick.
    """
    everything, level, hard = np.full(len(results.questions), True), list[Test](), list[Test]()
    for keep in MILD:
        small, random = results.row(name, keep), results.row("random", keep)
        wrong = scores_of(results, small).mean(0) < 0.5
        for method in METHODS:
            row = results.row(method, keep)
            level.append(paired(results, row, small, everything, f"{method} to {name} at {keep:.0%}"))
            hard.append(paired(results, row, random, wrong, f"{method} to random at {keep:.0%}, hard"))
    tests = corrected([*level, *hard])
    level, hard = list(tests[: len(level)]), list(tests[len(level) :])
    equal, better = sum(map(not_above, level)), sum(map(above, level))
    yield Finding(
        f"2a. {name} beats or equals most methods on all questions (row minus {name})",
        verdict(equal, better, len(level)),
        f"{better} of {len(level)} rows are above {name}, {equal} are below it or at most 5 points above",
        tuple(level),
    )
    gaining, flat = sum(map(above, hard)), sum(map(not_above, hard))
    yield Finding(
        f"2b. Most methods are ahead on the hard questions, those that {name} gets wrong (row minus random)",
        verdict(gaining, flat, len(hard)),
        f"{gaining} of {len(hard)} rows are above random there; {name} itself has 0 % there by construction",
        tuple(hard),
    )


def renumbered(original: Results, contiguous: Results) -> Finding:
    """Compare contiguous with original positions, method by method, on places and on all other questions."""
    types = np.array([question.type for question in original.questions])
    about_places = np.isin(types, PLACES)
    tests = []
    for chosen, words in ((about_places, "places"), (~about_places, "control")):
        for method in PLACE_METHODS:
            before, after = original.row(method, MILD[1]), contiguous.row(method, MILD[1])
            tests.append(paired(contiguous, after, before, chosen, f"{before.label}, {words}", base=original))
    joined = corrected(tests)
    places, control = joined[: len(PLACE_METHODS)], joined[len(PLACE_METHODS) :]
    ruined = sum(test.difference < 0 and test.p_holm < ALPHA for test in places)
    unharmed = sum(test.low >= -EQUAL for test in places)
    means = [100 * sum(test.difference for test in part) / len(part) for part in (places, control)]
    return Finding(
        f"3. Renumbered positions ruin questions about places, {_types(types[about_places])} (contiguous - original)",
        verdict(ruined, unharmed, len(places)),
        f"{ruined} of {len(places)} rows lose, {means[0]:+.1f} points in the mean; {means[1]:+.1f} on the control "
        f"questions ({_types(types[~about_places])})",
        joined,
    )


def _types(types: np.ndarray) -> str:
    return ", ".join(sorted(set(types.tolist())))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Answer the questions as far as they are not answered yet, print the findings and return them."""
    start = time.monotonic()
    model, processor = load()
    samples = load_data("reference")
    mild = first_images(samples, args.scenes)
    folder = args.folder / f"{args.scenes}"

    def progress(done: int, total: int, label: str) -> None:
        minutes = (time.monotonic() - start) / 60
        print(f"\r{minutes:5.1f} min  {done:6} of {total}  {label[:60]:60}", end="", flush=True)

    options: dict[str, Any] = {"measure": False, "examples": 0, "progress": progress, "batch_size": 32}
    specs = ["random", "downsample", "pool", *METHODS]
    results = compare(model, processor, mild, specs, list(MILD), output=folder / "mild", **options)
    places = [s for s in first_images(samples, args.place_scenes) if s.type in (*PLACES, "colour", "read")]
    by_position = {
        positions: Comparison(
            model,
            processor,
            places,
            Settings(measure=False, examples=0, batch_size=32, positions=positions, referee=False),
        ).run([*PLACE_METHODS], [MILD[1]], args.folder / f"{args.place_scenes}-{positions}", progress)
        for positions in ("original", "contiguous")
    }
    print("\r" + 90 * " ")
    findings = [
        random_beats_most(results),
        *downsampling(results, "downsample"),
        *downsampling(results, "pool"),
        renumbered(by_position["original"], by_position["contiguous"]),
    ]
    full, blind = results.row("full"), results.row("blind")
    print(f"{full.samples} questions: full {100 * full.accuracy:.1f} %, blind {100 * blind.accuracy:.1f} %\n")
    print(*findings, sep="\n")
    minutes = (time.monotonic() - start) / 60
    print(f"{minutes:.1f} minutes in this call")
    return {
        "environment": environment(model),
        "minutes": minutes,
        "findings": [asdict(finding) for finding in findings],
    }


def first_images(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return all questions about the first images; one about two images is about the last of them."""
    images = set(list(dict.fromkeys(sample.images[-1] for sample in samples))[:count])
    return [sample for sample in samples if sample.images[-1] in images]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--scenes", type=int, default=80, help="images of the first two critiques, 13 questions each")
    parser.add_argument(
        "--place-scenes", type=int, default=300, help="images of the third, two questions about a place each"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/critiques"), help="folder of the answers")
    run_script(parser, run)


if __name__ == "__main__":
    main()
