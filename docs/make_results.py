"""Print Markdown tables of a ``results.json``.

``python docs/make_results.py runs/final/results.json`` has one row per method and budget, with question types;
``… --budgets`` one row per method and one column per budget.
"""

import sys
from pathlib import Path

from tokensieve.evaluate import Results, Row


def interval(row: Row) -> str:
    return f"{100 * row.accuracy:.1f} ({100 * row.accuracy_low:.1f}–{100 * row.accuracy_high:.1f})"


def by_type(results: Results) -> None:
    types = [score.type for score in results.types[0]]
    print(f"| method | tokens | accuracy (95 %) | FLOPs | {' | '.join(types)} |")
    print("|---|---|---|---|" + "---|" * len(types))
    for row, scores in zip(results.rows, results.types, strict=True):
        flops = "–" if row.flops_ratio is None else f"{row.flops_ratio:.0%}"
        cells = " | ".join(f"{100 * score.accuracy:.0f}" for score in scores)
        print(f"| `{row.method}` | {row.tokens_after:.4g} | {interval(row)} | {flops} | {cells} |")


def by_budget(results: Results) -> None:
    budgets = sorted({row.keep for row in results.rows if row.keep}, reverse=True)
    print("| method | " + " | ".join(f"{budget:.0%}" for budget in budgets) + " |")
    print("|---|" + "---|" * len(budgets))
    for method in dict.fromkeys(row.method for row in results.rows):
        rows = {row.keep: row for row in results.rows if row.method == method}
        if set(rows) == {None}:
            only = rows[None]
            cells = [f"{interval(only)}, {only.tokens_after:.3g} tokens, {only.tokens_average:.3g} on average"]
        else:
            cells = [_cell(rows.get(budget)) for budget in budgets]
        print(f"| `{method}` | " + " | ".join(cells) + " |" * (1 + len(budgets) - len(cells)))


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    kept = "" if row.tokens_after == row.tokens_average else f", {row.tokens_after:.3g} kept"
    return interval(row) + kept


if __name__ == "__main__":
    found = Results.load(Path(sys.argv[1]))
    (by_budget if "--budgets" in sys.argv else by_type)(found)
