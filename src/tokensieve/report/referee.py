"""The referee's findings in words and as columns of tables; see :mod:`tokensieve.evaluate.referee`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tokensieve.evaluate.referee import SAME_TIME
from tokensieve.evaluate.rows import label
from tokensieve.evaluate.verdict import Against, Group, GroupScore, Overlap, Reference, Verdict
from tokensieve.report.decision import Decision
from tokensieve.report.table import (
    NONE,
    TOKENS,
    Cell,
    Column,
    Line,
    number,
    p_value,
    percent,
    points,
    points_interval,
)

ALPHA = 0.05
REFERENCES: tuple[Reference, ...] = ("full", "random", "downsample", "runner-up")


# -- sentences ------------------------------------------------------------------------------------------------------


def brief(decision: Decision) -> list[str]:
    """Return the findings for the terminal: hidden losses, the blind share, and baselines of equal time."""
    return [*hidden_losses(decision), *_blind(decision), *_equal_time(decision)]


def findings(decision: Decision) -> list[str]:
    """Return the findings of the page's section in plain sentences; hidden losses stand above the results."""
    return [
        *_blind(decision),
        *_hard(decision),
        *_equal_time(decision),
        *_corrected(decision),
        *_unstable(decision),
    ]


def hidden_losses(decision: Decision) -> Iterator[str]:
    """Yield a sentence for each guarded question type that loses while the mean looks fine."""
    for line, verdict in _verdicts(decision):
        for guard in verdict.guards:
            yield (
                f"Hidden loss: {line.row.label} loses {percent(-guard.difference)} points on {guard.type} "
                f"({points_interval(guard.low, guard.high)}, {guard.samples} questions), while its mean is "
                f"{points(guard.mean)} to full."
            )


def _blind(decision: Decision) -> Iterator[str]:
    if reason := decision.results.settings.get("no_blind"):
        yield f"There is no blind row: {reason}."
    if decision.blind is None or decision.full is None:
        return
    row, full = decision.blind.row, decision.full.row
    text = (
        f"Without the image the model answers {percent(row.accuracy)} % right "
        f"({percent(row.accuracy_low)}–{percent(row.accuracy_high)})"
    )
    group = None if full.referee is None else full.referee.group("needs image")
    if group is None or group.accuracy is None:
        yield f"{text}."
    else:
        yield f"{text}; of the {group.samples} questions that need the image, full answers {percent(group.accuracy)} %."


def _equal_time(decision: Decision) -> Iterator[str]:
    """Name the methods that are not ahead of the baseline whose prefill takes as long."""
    compared = [(line, verdict.to("equal time")) for line, verdict in _verdicts(decision) if line.kind == "method"]
    if not compared:
        return
    if all(against is None for _, against in compared):
        reason = "was not timed" if decision.costs[-1] != "prefill_ms" else "of no baseline was timed"
        yield f"Prefill {reason}, so that nothing is compared at equal time."
        return
    near = [(line, against) for line, against in compared if against is not None and _same_time(against)]
    level = [
        f"{line.row.label} ({points(against.difference)} to {label(against.method, against.keep)}, "
        f"{points_interval(against.low, against.high)})"
        for line, against in near
        if against.low <= 0
    ]
    if level:
        yield f"Not ahead of the baseline whose prefill takes as long: {', '.join(level)}."
    elif near:
        yield f"Ahead of the baseline whose prefill takes as long: all {len(near)} methods that have one."
    apart = len(compared) - len(near)
    if apart:
        yield f"No baseline's prefill takes about as long (within {SAME_TIME:g}×) as that of {apart} methods' rows."


def _same_time(against: Against) -> bool:
    ratio = against.time_ratio
    return ratio is not None and 1 / SAME_TIME <= ratio <= SAME_TIME


def _hard(decision: Decision) -> Iterator[str]:
    """Name the most accurate row of a budget on the questions that downsampling gets wrong."""
    for budget in decision.budgets:
        scored = [
            (line, score)
            for line in budget.lines
            if line.ranked
            and line.row.referee is not None
            and (score := line.row.referee.group("hard")) is not None
            and score.by != line.row.label
        ]
        if not scored:
            continue
        line, score = max(scored, key=lambda pair: pair[1].accuracy or 0.0)
        start = f"At {budget.name}, {score.by} gets {score.samples} questions wrong"
        if score.few or score.accuracy is None or score.low is None or score.high is None:
            yield f"{start}: too few to compare rows on them."
            continue
        text = f"{start}; on these {line.row.method} leads with {percent(score.accuracy)} % "
        text += f"({percent(score.low)}–{percent(score.high)}"
        if score.difference is not None and score.difference_low is not None and score.difference_high is not None:
            gap = points_interval(score.difference_low, score.difference_high)
            text += f"; {points(score.difference)} to random, {gap}"
        yield f"{text})."


def _corrected(decision: Decision) -> Iterator[str]:
    """Count the rows that differ from each reference, before and after Holm's correction."""
    for reference in REFERENCES:
        tests = [
            against
            for _, verdict in _verdicts(decision)
            if (against := verdict.to(reference)) is not None and against.p is not None and against.p_holm is not None
        ]
        if not tests:
            continue
        plain = sum(test.p is not None and test.p < ALPHA for test in tests)
        holm = sum(test.p_holm is not None and test.p_holm < ALPHA for test in tests)
        name = "its runner-up" if reference == "runner-up" else reference
        yield (
            f"Against {name}, {plain} of {len(tests)} rows differ by McNemar's exact test at 5 %, and {holm} after "
            f"Holm's correction for the {len(tests)} tests."
        )


def _unstable(decision: Decision) -> Iterator[str]:
    """Name the row that keeps the most different places when the image moves."""
    moved = [
        (verdict.overlap, line)
        for line, verdict in _verdicts(decision)
        if line.kind == "method" and verdict.overlap is not None
    ]
    if moved:
        overlap, line = min(moved, key=lambda pair: pair[0].shift - pair[0].chance)
        yield (
            f"When the image moves by {overlap.pixels} px, {line.row.label} keeps the most different places of all "
            f"methods: overlap {overlap.shift:.2f} (1 is equal, {overlap.chance:.2f} is chance), on {overlap.images} "
            f"image{'s' * (overlap.images > 1)}."
        )


def _verdicts(decision: Decision) -> Iterator[tuple[Line, Verdict]]:
    for line in decision.lines:
        if line.row.referee is not None:
            yield line, line.row.referee


# -- columns --------------------------------------------------------------------------------------------------------


def _cell(text: Callable[[Verdict], Cell]) -> Callable[[Line], Cell]:
    """Return the cell of rows that the referee examined."""
    return lambda line: Cell(NONE) if line.row.referee is None else text(line.row.referee)


def _against(reference: Reference) -> Callable[[Line], Cell]:
    def text(verdict: Verdict) -> Cell:
        against = verdict.to(reference)
        if against is None:
            return Cell(NONE)
        parts = [points_interval(against.low, against.high)]
        if reference in ("runner-up", "equal time"):
            parts.insert(0, against.method if reference == "runner-up" else label(against.method, against.keep))
        if against.time_ratio is not None:
            parts.insert(1, f"{number(against.time_ratio)}× the time")
        if against.p is not None and against.p_holm is not None:
            parts.append(f"p {p_value(against.p)}, Holm {p_value(against.p_holm)}")
        return Cell(points(against.difference), "\n".join(parts), lost=against.high < 0)

    return _cell(text)


def _group(name: Group) -> Callable[[Line], Cell]:
    def text(verdict: Verdict) -> Cell:
        score = verdict.group(name)
        return Cell(NONE) if score is None else _scored(score)

    return _cell(text)


def _scored(score: GroupScore) -> Cell:
    count = f"n={score.samples}"
    if score.few or score.accuracy is None or score.low is None or score.high is None:
        return Cell("too few", count)
    parts = [f"{percent(score.low)}–{percent(score.high)}, {count}"]
    if score.difference is not None and score.difference_low is not None and score.difference_high is not None:
        parts.append(f"{points(score.difference)} to random")
        parts.append(points_interval(score.difference_low, score.difference_high))
    lost = score.difference_high is not None and score.difference_high < 0
    return Cell(percent(score.accuracy), "\n".join(parts), lost=lost)


def _seeds(verdict: Verdict) -> Cell:
    if verdict.seed_low is None or verdict.seed_high is None:
        return Cell(NONE)
    return Cell(f"{percent(verdict.seed_low)}–{percent(verdict.seed_high)}", f"{verdict.seeds} seeds")


def _overlap(text: Callable[[Overlap], str]) -> Callable[[Line], Cell]:
    return _cell(lambda verdict: Cell(NONE if verdict.overlap is None else text(verdict.overlap)))


def _guard(verdict: Verdict) -> Cell:
    return Cell(", ".join(guard.type for guard in verdict.guards), lost=bool(verdict.guards))


GUARD = Column("hidden loss", "a guarded question type loses, though the mean looks fine", _cell(_guard))
TESTS: tuple[Column, ...] = (
    TOKENS,
    Column("to full", "points to the full model, with the 95 % interval, McNemar's p and Holm's", _against("full")),
    Column("to random", "the same to random with about as many tokens", _against("random")),
    Column("to downsample", "the same to downsample with about as many tokens", _against("downsample")),
    Column("to runner-up", "the same to the next accurate row of the budget", _against("runner-up")),
    Column(
        "at equal time",
        "the same to the baseline whose prefill time is nearest; × is that baseline's time ÷ this row's",
        _against("equal time"),
    ),
)
GROUPS: tuple[Column, ...] = (
    TOKENS,
    Column("needs the image", "questions that the blind model gets wrong", _group("needs image")),
    Column("hard", "questions that downsample with about as many tokens gets wrong", _group("hard")),
    Column("easy", "questions that it gets right", _group("easy")),
    Column("hard, full right", "hard questions that full answers right", _group("hard, full right")),
    Column("easy, full right", "easy questions that full answers right", _group("easy, full right")),
)
STABILITY: tuple[Column, ...] = (
    TOKENS,
    Column("worst to best seed", "accuracy % of the worst and the best seed", _cell(_seeds)),
    Column(
        "overlap, moved",
        "Jaccard index of the kept places, image against moved image; 1 is equal",
        _overlap(lambda overlap: f"{overlap.shift:.2f}"),
    ),
    Column(
        "overlap, seeds",
        "the same for two seeds",
        _overlap(lambda overlap: NONE if overlap.seeds is None else f"{overlap.seeds:.2f}"),
    ),
    Column(
        "chance",
        "overlap of two independent draws of as many tokens",
        _overlap(lambda overlap: f"{overlap.chance:.2f}"),
    ),
    Column(
        "same answer",
        "share of these images whose answer stays the same when they move",
        _overlap(lambda overlap: f"{overlap.answers:.0%}"),
    ),
)


def tables(decision: Decision) -> list[tuple[str, str, tuple[Column, ...]]]:
    """Return the tables of the page that have something to show: title, caption, columns."""
    verdicts = [verdict for _, verdict in _verdicts(decision)]
    drawn = []
    if any(verdict.against for verdict in verdicts):
        caption = "Points, paired by question, with the 95 % interval, McNemar's exact p and p after Holm's correction."
        drawn.append(("Tests against other rows", caption, TESTS))
    if any(verdict.groups for verdict in verdicts):
        caption = (
            "Percent right with the 95 % interval, on groups that another row's answers choose; that row itself has 0 "
            "or 100 %. Compare rows within a column, first of all with random."
        )
        drawn.append(("Which questions need the image, and which are hard", caption, GROUPS))
    if any(verdict.overlap or verdict.seeds > 1 for verdict in verdicts):
        caption = "Stability: seeds, and the kept places of the example images when they move by a few pixels."
        drawn.append(("Seeds and small shifts", caption, STABILITY))
    return drawn
