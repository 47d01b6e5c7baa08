"""`tokensieve tune` beside an exhaustive search of the same configurations on the bundled benchmark: choice and cost.

The exhaustive search answers every question with every configuration, and chooses the cheapest whose drop of accuracy
is within the bound with 95 % confidence over all questions. Then the search of `tune` runs for each bound and seed. It
is given the answers of the exhaustive search where it asks for them, and is charged for each. The first ``--real`` of
these searches also run as `tune` itself, which answers anew in a folder of its own: choice and number must be the same.
All choices are judged on all questions. The same call continues after an interruption.

    python benchmarks/tune_vs_exhaustive.py --output tune.json
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from script import parser_of, run_script
from tokensieve.commands.arguments import split_budgets, split_specs
from tokensieve.evaluate import Sample, environment, load_data
from tokensieve.evaluate.journal import Journal
from tokensieve.evaluate.plan import Settings
from tokensieve.evaluate.provenance import predictions_setup
from tokensieve.evaluate.table import clusters
from tokensieve.reference import load
from tokensieve.tune import Candidate, space, tune
from tokensieve.tune.asking import Asker
from tokensieve.tune.costs import count_all
from tokensieve.tune.search import split
from tokensieve.tune.space import attachable
from tokensieve.tune.statistics import Drop, drop_of
from tokensieve.tune.steps import Search


class Replay(Asker):
    """Takes each answer that is asked for from those of the exhaustive search."""

    source: Journal

    def ask(self, candidate: Candidate | None, block: Sequence[Sample]) -> int:
        known, answers = self.journal.answers.get(self.key(candidate), {}), self.source.answers[self.key(candidate)]
        new = [answers[key] for sample in block if (key := self.keys[sample.id]) not in known]
        self.journal.add(self.key(candidate), new)
        return len(new)


def run(args: argparse.Namespace) -> dict[str, Any]:
    model, processor = load()
    samples = load_data("reference", limit=args.limit)
    settings = Settings(batch_size=args.batch_size, max_new_tokens=4)
    methods, keeps = split_specs(args.methods), split_budgets(args.keep)
    candidates, refused = attachable(model, space(methods, keeps), processor=processor, **settings.attach_options())
    setup = predictions_setup(model, processor, settings)
    asker = Asker(model, processor, samples, settings, Journal(args.folder / "exhaustive", setup))
    for number, candidate in enumerate([None, *candidates]):
        asker.ask(candidate, samples)
        print(f"{number} of {len(candidates)}: {candidate}: {asker.scores(candidate, samples).mean():.4f}", flush=True)
    costs = count_all(asker, candidates, samples, lambda number: None)
    full, images = asker.scores(None, samples), clusters(samples)
    drops = {c.run.key: drop_of(full, asker.scores(c, samples), images) for c in candidates}
    table = sorted(candidates, key=lambda candidate: costs[candidate.run.key])
    exhaustive_answers = (len(candidates) + 1) * len(samples)
    results: list[dict[str, Any]] = []
    for bound in args.max_drop:
        holding = [c for c in table if drops[c.run.key].high <= bound and costs[c.run.key] < 1]
        for seed in args.seeds:
            options = {"methods": methods, "keeps": keeps, "trials": None, "seed": seed, "settings": settings}
            folder = args.folder / f"replay-{bound}-{seed}"
            replay = Replay(model, processor, samples, settings, Journal(folder, setup))
            replay.source = asker.journal
            held_images, searched = split(samples, seed)
            held_out = [sample for image in held_images for sample in image]
            search = Search(replay, bound, None, None, "flops", seed, None)
            result = search.run(space(methods, keeps, seed=seed), searched, held_out)
            row = {
                "max_drop": bound,
                "seed": seed,
                "verdict": result.verdict,
                "tune": judged(result.chosen and str(result.chosen), table, drops, costs),
                "exhaustive": judged(str(holding[0]) if holding else None, table, drops, costs),
                "answers": result.answers,
                "share_of_exhaustive_answers": result.answers / exhaustive_answers,
            }
            if len(results) < args.real:
                real = tune(
                    model, processor, samples, max_drop=bound, output=args.folder / f"tune-{bound}-{seed}", **options
                )
                row["real"] = {"chosen": real.chosen and str(real.chosen), "answers": real.answers}
            results.append(row)
            print(row, flush=True)
    return {
        "settings": {name: str(value) for name, value in vars(args).items() if name not in ("output", "folder")},
        "environment": environment(model),
        "questions": len(samples),
        "accuracy_full": float(np.mean(full)),
        "configurations": len(candidates),
        "refused": refused,
        "exhaustive_answers": exhaustive_answers,
        "results": results,
        "all": [judged(str(candidate), table, drops, costs) for candidate in table],
    }


def judged(
    label: str | None, table: Sequence[Candidate], drops: Mapping[str, Drop], costs: Mapping[str, float]
) -> dict[str, Any] | None:
    """Return the cost of a configuration, by its full spec, and its drop on all questions."""
    if label is None:
        return None
    (key,) = {candidate.run.key for candidate in table if str(candidate) == label}
    drop = drops[key]
    return {
        "configuration": label,
        "flops": round(costs[key], 4),
        "accuracy": round(drop.accuracy, 5),
        "drop": round(drop.mean, 5),
        "drop_at_most": round(drop.high, 5),
    }


def main() -> None:
    parser = parser_of(__doc__, threads=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/tune-vs-exhaustive"), help="folder of the answers")
    parser.add_argument("--methods", default="fastervlm, divprune, fastv")
    parser.add_argument("--keep", default="50%, 33%, 25%, 16%")
    parser.add_argument("--max-drop", type=float, nargs="+", default=[0.02, 0.03])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--real", type=int, default=1, help="searches that tune itself repeats with answers of its own")
    parser.add_argument("--limit", type=int, help="questions (all 2,100)")
    parser.add_argument("--batch-size", type=int, default=64)
    run_script(parser, run)


if __name__ == "__main__":
    main()
