"""Tables of comparisons.

``python docs/make_results.py`` writes the tables of ``docs/results.md`` from the ledger ``docs/results.jsonl``;
``… runs/zoo/results.json …`` takes the rows of these results into the ledger first, in place of older ones;
``… --types runs/final/results.json`` prints one table with question types instead (the last one of ``results.md``);
``… --repair runs/repair/results.json runs/zoo/results.json …`` lists rows with repaired attention beside those without;
``… --adaptive runs/adaptive/results.json runs/zoo/results.json …`` lists budgets that fit each image beside fixed ones.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from tokensieve.budget import Budget
from tokensieve.evaluate import Results, Row, VsRandom
from tokensieve.evaluate.intervals import PairedDifference, in_points, paired_difference

DOCS = Path(__file__).parent
LEDGER, PAGE = DOCS / "results.jsonl", DOCS / "results.md"


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: what a row of results says about accuracy.

    Attributes:
        budget: what ``keep`` counts: tokens "kept", or on "average" over the layers of the LLM.
        keep: a share of the tokens, a number of them, or ``None`` for methods that choose it themselves.
        chance: the row against random with about as many tokens.
    """

    budget: str
    method: str
    keep: float | None
    tokens_after: float
    tokens_average: float
    samples: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    chance: VsRandom | None

    @property
    def accuracies(self) -> str:
        return interval(self)

    @property
    def mark(self) -> str:
        """↑ above random, ↓ below it, ≈ not told apart from it; nothing where the two were not compared."""
        return "" if self.chance is None else " ↑" if self.chance.won else " ↓" if self.chance.lost else " ≈"

    def same(self, other: Entry) -> bool:
        return (self.budget, self.method, self.keep) == (other.budget, other.method, other.keep)


def interval(row: Row | Entry) -> str:
    return f"{100 * row.accuracy:.1f} ({100 * row.accuracy_low:.1f}–{100 * row.accuracy_high:.1f})"


def wished(keep: float) -> str:
    """A budget as one says it."""
    return f"{keep:.0%}" if isinstance(keep, float) else f"{keep} tokens"


def ledger() -> list[Entry]:
    """Everything measured so far."""
    lines = map(json.loads, LEDGER.read_text("utf-8").splitlines())
    return [Entry(**{**line, "chance": line["chance"] and VsRandom(**line["chance"])}) for line in lines]


def enter(results: Results) -> None:
    """Put the rows of these results into the ledger, in place of those of the same method and budget."""
    known = ledger() if LEDGER.exists() else []
    names = {field.name for field in fields(Entry)} & {field.name for field in fields(Row)}
    for row in results.rows:
        shown = {name: value for name, value in asdict(row).items() if name in names}
        budget = {"final": "kept"}.get(results.settings["keep_means"], "average")  # the words of the page's comments
        entry = Entry(budget, **shown, chance=row.random)
        place = next((number for number, old in enumerate(known) if old.same(entry)), len(known))
        known[place : place + 1] = [entry]
    LEDGER.write_text("".join(json.dumps(_short(asdict(entry))) + "\n" for entry in known), "utf-8")


def _short(value: object) -> object:
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items()}
    return round(value, 5) if isinstance(value, float) else value


def page(text: str, entries: Sequence[Entry]) -> str:
    """``docs/results.md`` with its tables made anew: each stands between two comments that name its convention."""

    def replaced(match: re.Match[str]) -> str:
        mine = [entry for entry in entries if entry.budget == match[2]]
        return "\n".join([match[1], "", *by_budget(mine), "", *against_random(mine), "", match[4]])

    return re.sub(r"(<!-- budget: (\w+) -->)(.*?)(<!-- end -->)", replaced, text, flags=re.S)


def by_budget(entries: Sequence[Entry]) -> Iterator[str]:
    """One row per method, one column per budget; methods without one are told with their tokens."""
    budgets = _budgets(entries)
    yield "| method | " + " | ".join(map(wished, budgets)) + " |"
    yield "|---|" + "---|" * len(budgets)
    for method in dict.fromkeys(entry.method for entry in entries):
        rows = {entry.keep: entry for entry in entries if entry.method == method}
        cells = [_cell(rows.get(budget)) for budget in budgets]
        if not any(cells):
            cells = [", ".join(_cell(row, tokens=True) for row in rows.values()), *cells[1:]]
        yield f"| `{method}` | " + " | ".join(cells) + " |"


def _budgets(entries: Sequence[Entry]) -> list[float]:
    """The budgets at which several methods ran."""
    found = [entry.keep for entry in entries if entry.keep is not None]
    return sorted({keep for keep in found if found.count(keep) > 1}, reverse=True)


def _cell(row: Entry | None, *, tokens: bool = False) -> str:
    if row is None:
        return ""
    left = f", {row.tokens_after:.3g} kept" if tokens or row.tokens_after != row.tokens_average else ""
    average = f", {row.tokens_average:.3g} on average" if tokens and row.tokens_after != row.tokens_average else ""
    return row.accuracies + row.mark + left + average


def against_random(entries: Sequence[Entry]) -> Iterator[str]:
    """Who is below random with about as many tokens, or not told apart from it, at each budget."""
    methods = [
        entry for entry in entries if entry.method.partition("(")[0] not in ("full", "random", "oracle", "blind")
    ]
    for budget in [*_budgets(entries), None]:
        here = [entry for entry in methods if entry.keep == budget]
        lost = [entry for entry in here if entry.mark == " ↓"]
        tied = [entry for entry in here if entry.mark == " ≈"]
        unmet = [entry for entry in here if entry.chance is None]
        where = "At a number of tokens of their own" if budget is None else f"At {wished(budget)}"
        said = [f"{_names(lost) or 'no method'} {'are' if len(lost) > 1 else 'is'} below `random`"]
        said += [f"{_names(tied)} not told apart from it"] if tied else []
        said += [f"{_names(unmet)} not compared"] if unmet else []
        if here:
            yield f"- {where}, {'; '.join(said)}."


def _names(entries: Sequence[Entry]) -> str:
    return ", ".join(f"`{entry.method}`" for entry in entries)


def by_type(results: Results) -> Iterator[str]:
    """One row per method and budget, with question types."""
    types = [score.type for score in results.rows[0].types]
    yield f"| method | tokens | accuracy (95 %) | FLOPs | {' | '.join(types)} |"
    yield "|---|---|---|---|" + "---|" * len(types)
    for row in results.rows:
        flops = "–" if row.flops_ratio is None else f"{row.flops_ratio:.0%}"
        cells = " | ".join(f"{100 * score.accuracy:.0f}" for score in row.types)
        yield f"| `{row.method}` | {row.tokens_after:.4g} | {interval(row)} | {flops} | {cells} |"


def by_repair(repaired: Results, plain: Sequence[Results]) -> Iterator[str]:
    """One row per method with repaired attention, and its difference to the same row without, paired by question."""
    keeps = sorted({row.keep for row in repaired.rows if isinstance(row.keep, float)}, reverse=True)
    yield f"| method | {' | '.join(f'{keep:.0%} | repair minus none' for keep in keeps)} |"
    yield "|---|" + "---|---|" * len(keeps)
    lifted, lowered, total = 0, 0, 0
    for method in dict.fromkeys(row.method for row in repaired.rows if row.keep in keeps and row.method != "oracle"):
        cells = []
        for keep in keeps:
            row = repaired.row(method, keep)
            gap = difference(repaired, row, plain, keep)
            lifted, lowered, total = lifted + (gap.low > 0), lowered + (gap.high < 0), total + 1
            cells.append(f"{interval(row)} | {shown(gap)}")
        yield f"| `{method}` | {' | '.join(cells)} |"
    yield f"\nOf {total} rows, {lifted} are lifted and {lowered} lowered by their 95 % intervals."


def by_average(adaptive: Results, plain: Sequence[Results]) -> Iterator[str]:
    """One row per method and average, with the difference of each criterion to the fixed budget of as many tokens."""
    parts = [(row, str(row.keep).split(":")) for row in adaptive.rows]
    rules = [(row, rule[1], rule[2]) for row, rule in parts if rule[0] == "average"]
    criteria = list(dict.fromkeys(criterion for _, _, criterion in rules))
    yield f"| method | tokens | fixed | {' | '.join(f'`{name}` minus fixed' for name in criteria)} |"
    yield "|---|---|---|" + "---|" * len(criteria)
    for method, tokens in dict.fromkeys((row.method, tokens) for row, tokens, _ in rules):
        fixed = next(row for results in plain for row in results.rows if same_tokens(row, method, int(tokens)))
        gaps = {
            criterion: f"{shown(difference(adaptive, row, plain, fixed.keep))}, {row.tokens_after:.3g} tokens"
            for row, number, criterion in rules
            if (row.method, number) == (method, tokens)
        }
        cells = " | ".join(gaps.get(criterion, "") for criterion in criteria)
        yield f"| `{method}` | {tokens}: {fixed.tokens_after:.3g} | {interval(fixed)} | {cells} |"


def same_tokens(row: Row, method: str, tokens: int) -> bool:
    """Return whether a row has this method, and a share that keeps this number of an image's 144 tokens."""
    return row.method == method and isinstance(row.keep, float) and round(144 * row.keep) == tokens


def difference(results: Results, row: Row, others: Sequence[Results], keep: Budget | None) -> PairedDifference:
    """Return a row's accuracy minus that of the same method at ``keep`` in the others, paired by question."""
    other = next(other for other in others if any((r.method, r.keep) == (row.method, keep) for r in other.rows))
    return paired_difference(scores_of(results, row), scores_of(other, other.row(row.method, keep)), clusters(other))


def shown(gap: PairedDifference) -> str:
    mark = " ↑" if gap.low > 0 else " ↓" if gap.high < 0 else ""
    return in_points(gap.difference, gap.low, gap.high, sign="+") + mark


def scores_of(results: Results, row: Row) -> np.ndarray:
    """Return the scores of a row, `[seeds, questions]`, in the order of the questions' ids."""
    order = sorted(range(len(results.questions)), key=lambda n: results.questions[n].id)
    return np.array(results.scores[results.rows.index(row)], dtype=float)[:, order]


def clusters(results: Results) -> np.ndarray:
    questions = sorted(results.questions, key=lambda question: question.id)
    return np.array([question.cluster for question in questions])


if __name__ == "__main__":
    options, files = [a for a in sys.argv[1:] if a.startswith("-")], [a for a in sys.argv[1:] if not a.startswith("-")]
    if options == ["--types"]:
        print("\n".join(line for file in files for line in by_type(Results.load(Path(file)))))
    elif options == ["--repair"]:
        repaired, *plain = (Results.load(Path(file)) for file in files)
        print("\n".join(by_repair(repaired, plain)))
    elif options == ["--adaptive"]:
        adaptive, *plain = (Results.load(Path(file)) for file in files)
        print("\n".join(by_average(adaptive, plain)))
    else:
        for file in files:
            enter(Results.load(Path(file)))
        PAGE.write_text(page(PAGE.read_text("utf-8"), ledger()), "utf-8")
