"""Remarks of the report about its rows, each made only where an interval or a count supports it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokensieve.evaluate import Results, Row, TypeScore
from tokensieve.evaluate.kinds import REDUCING
from tokensieve.report.decision import Decision, faster
from tokensieve.report.table import Line, percent, points, points_interval, ratio, to_full

FEW = 200  # questions
FLOOR = 0.2  # below this accuracy of the full model, methods have little to lose
LISTED = 5  # skipped samples that a remark names


def warnings(decision: Decision) -> list[str]:
    """Return the reasons to distrust the whole run, to be read before any result."""
    results = decision.results
    unfinished = [] if results.complete else ["This run is not complete: rows or costs are still to come."]
    return [
        *unfinished,
        *_foreign(results),
        *_floor(decision),
        *_samples(results),
        *_skipped(results),
        *decision.timing_notes(),
    ]


def remarks(decision: Decision) -> list[str]:
    """Return plain sentences about rows, each computed from the results."""
    return [
        *_kept_whole(decision),
        *_unranked(decision),
        *_against_random(decision),
        *_losses_by_type(decision),
        *_leaders_by_type(decision),
        *_speed(decision),
    ]


def _foreign(results: Results) -> Iterator[str]:
    if results.settings.get("foreign_images"):
        yield "The bundled model knows only its own drawn scenes: its answers about these pictures mean nothing."


def _floor(decision: Decision) -> Iterator[str]:
    if decision.full is not None and decision.full.row.accuracy < FLOOR:
        yield (
            f"The full model answers only {percent(decision.full.row.accuracy)} % right, so the numbers say little "
            "about the methods: check model, prompt, metric and data first."
        )


def _samples(results: Results) -> Iterator[str]:
    fewest = min((row.samples for row in results.rows), default=FEW)
    if fewest < FEW:
        yield (
            f"Only {fewest} questions: the intervals are wide, and “not told apart” means little. "
            "Decide on more questions."
        )


def _skipped(results: Results) -> Iterator[str]:
    if results.skipped:
        listed = "; ".join(f"{sample.where}: {sample.reason}" for sample in results.skipped[:LISTED])
        more = f"; and {len(results.skipped) - LISTED} more" if len(results.skipped) > LISTED else ""
        count = len(results.skipped)
        yield f"{count} {'questions were' if count > 1 else 'question was'} skipped and not counted: {listed}{more}."


def _kept_whole(decision: Decision) -> Iterator[str]:
    """Name the methods that dropped no token: their budget covers every image, or they chose to keep all."""
    rows = [
        line.row
        for line in decision.lines
        if line.kind in REDUCING and line.row.tokens_average >= line.row.tokens_before
    ]
    if rows:
        yield f"Dropped no token, so that these rows are the full model with the method's cost: {_list(rows)}."


def _unranked(decision: Decision) -> Iterator[str]:
    rows = [
        f"{row.label} ({row.tokens_average:.4g} against {group.tokens:.4g})"
        for group in decision.budgets
        for row in group.unranked
    ]
    if rows:
        yield (
            "Not ranked, as their tokens averaged over the LLM's layers differ by more than a fifth from those of the "
            f"other methods: {', '.join(rows)}."
        )


def _against_random(decision: Decision) -> Iterator[str]:
    """Name the rows below random, or not told apart from it, by the interval of the difference paired by question."""
    lines = [line for line in decision.lines if line.kind in ("method", "baseline")]
    random_ran = any(line.kind == "random" for line in decision.lines)
    not_compared = [line.row for line in lines if line.row.random is None and line.kind == "method"]
    if not_compared and not random_ran:
        yield "There is no random baseline in this run, so nothing here shows that a method chooses well."
    elif not_compared:
        yield f"Not compared with random, which did not run with about as many tokens: {_list(not_compared)}."
    compared = [(line.row, line.row.random) for line in lines if line.row.random is not None]
    lost = [
        f"{row.label} ({points(random.difference)}, {points_interval(random.low, random.high)})"
        for row, random in compared
        if random.lost
    ]
    if lost:
        yield f"Below random with about as many tokens (points, with their paired 95 % interval): {', '.join(lost)}."
    ties = [row for row, random in compared if not random.lost and not random.won]
    if ties:
        yield f"Not told apart from random, as the interval of the difference holds zero: {_list(ties)}."


def _losses_by_type(decision: Decision) -> Iterator[str]:
    """Name the question types on which the best row of a budget is below the full model."""
    for group in decision.budgets:
        if group.choice is None:
            continue
        row = group.choice.best.row
        gaps = [(score.type, gap) for score in row.types if (gap := to_full(score)) is not None and gap[2] < 0]
        if gaps:
            losses = sorted(gaps, key=lambda loss: loss[1])
            listed = ", ".join(f"{kind} {points(gap[0])} ({points_interval(*gap[1:])})" for kind, gap in losses)
            yield f"At {group.name} {row.method} loses points on these question types: {listed}."


def _leaders_by_type(decision: Decision) -> Iterator[str]:
    """Name the row that is ahead of each other ranked row on a question type, by the paired interval."""
    for group in decision.budgets:
        ranked = [line for line in group.lines if line.ranked]
        leaders: dict[str, list[str]] = {}
        for kind in _types(ranked):
            leader = _leader(decision.results, ranked, kind)
            if leader is not None:
                leaders.setdefault(leader.method, []).append(kind)
        if leaders:
            listed = "; ".join(f"{method} on {', '.join(kinds)}" for method, kinds in leaders.items())
            yield f"At {group.name}, ahead of every other method on a question type: {listed}."


def _types(lines: Sequence[Line]) -> list[str]:
    return [score.type for score in lines[0].row.types] if len(lines) > 1 else []


def _leader(results: Results, lines: Sequence[Line], kind: str) -> Row | None:
    accuracies = {id(line): _score(line.row, kind).accuracy for line in lines}
    best, *others = sorted(lines, key=lambda line: -accuracies[id(line)])
    # the closest rows come first, so that one comparison usually decides
    if all(results.paired(best.row, line.row, type=kind).told_apart for line in others):
        return best.row
    return None


def _score(row: Row, kind: str) -> TypeScore:
    return next(score for score in row.types if score.type == kind)


def _speed(decision: Decision) -> Iterator[str]:
    slow = [line.row for line in decision.lines if line.kind != "full" and faster(line.row) is False]
    if slow:
        rows = ", ".join(f"{row.label} ({ratio(row.prefill_speedup)}×)" for row in slow)
        yield f"Prefill slower than the full model's on this model and machine, by the quartiles: {rows}."


def _list(rows: Sequence[Row]) -> str:
    return ", ".join(row.label for row in rows)


def explanations(decision: Decision) -> list[tuple[str, str]]:
    """Return (term, meaning) of the rows and marks that need one; only of those that occur."""
    kinds = {line.kind for line in decision.lines}
    seeds = _seeds(decision)
    average = decision.results.settings.get("keep_means") == "average"
    terms = [("full", "the model without a method.")] if "full" in kinds else []
    if "blind" in kinds:
        terms.append(("blind", "the model without the image: no visual token, the same question."))
    if "oracle" in kinds:
        terms.append(
            (
                "oracle",
                "no method: keeps the tokens of the asked object first, whose place it is given. It is no upper bound: "
                "methods can beat it, for example where a question needs more than this object.",
            )
        )
    if "random" in kinds:
        mean = f"the mean of {seeds} seeds" if seeds > 1 else "one seed"
        terms.append(
            ("random", f"keeps tokens drawn at random, places drawn per image; {mean}. A method should beat it.")
        )
    if "baseline" in kinds:
        names = dict.fromkeys(line.row.method for line in decision.lines if line.kind == "baseline")
        terms.append(
            (
                ", ".join(names),
                ("a simple baseline" if len(names) == 1 else "simple baselines") + ", without a choice by content.",
            )
        )
    terms += [
        (
            "budget",
            ("tokens averaged over the LLM's layers" if average else "tokens that stay at the end")
            + ", per image. Rows of a budget are ranked if their tokens, averaged over the LLM's layers, are at most a "
            "fifth apart, as a method inside the LLM runs its first layers with all tokens.",
        ),
        (
            "not told apart",
            "the 95 % interval of the paired difference holds zero, which does not mean equal. About one interval in "
            "20 misses the truth. The best of many methods is chosen on these questions, which flatters it a little.",
        ),
    ]
    if any(line.row.prefill_speedup is not None for line in decision.lines):
        terms.append(
            (
                "faster, slower",
                "used only where the quartiles of the paired rounds exclude 1. Times are for one prompt here.",
            )
        )
    if decision.full is not None:
        terms.append(
            (
                "Pareto",
                "no other row is as accurate at a lower cost, or more accurate at no higher cost, by the values shown; "
                "their intervals can overlap. The oracle does not take part."
                + (" Times are uncertain in this run and mark no row." if decision.timing_notes() else ""),
            )
        )
    return terms


def _seeds(decision: Decision) -> int:
    seeds = [
        len(scores)
        for row, scores in zip(decision.results.rows, decision.results.scores, strict=True)
        if any(line.row is row and line.kind == "random" for line in decision.lines)
    ]
    return max(seeds, default=1)
