"""Print the README's results table from a ``results.json``: ``python docs/make_results.py runs/final/results.json``."""

import sys
from pathlib import Path

from tokensieve.evaluate import Results


def main(path: str) -> None:
    results = Results.load(Path(path))
    types = [score.type for score in results.types[0]]
    print(f"| method | tokens | accuracy (95 %) | FLOPs | {' | '.join(types)} |")
    print("|---|---|---|---|" + "---|" * len(types))
    for row, scores in zip(results.rows, results.types, strict=True):
        accuracy = f"{100 * row.accuracy:.1f} ({100 * row.accuracy_low:.1f}–{100 * row.accuracy_high:.1f})"
        flops = "–" if row.flops_ratio is None else f"{row.flops_ratio:.0%}"
        cells = " | ".join(f"{100 * score.accuracy:.0f}" for score in scores)
        print(f"| `{row.method}` | {row.tokens_after:.4g} | {accuracy} | {flops} | {cells} |")


if __name__ == "__main__":
    main(sys.argv[1])
