"""The ablations of ``demand-cover`` on the validation split, and its time beside other methods.

Each ablation is the method without one of its parts, on questions that share nothing with the test split. Differences
are to the whole method, paired by question. The time is that of the selection alone, on random tokens; the methods
take turns in one process, and every ratio is of one round.

    python benchmarks/demand_cover.py --output runs/demand-cover            # ablations
    python benchmarks/demand_cover.py --time --repeats 51                   # ratios of times
    python benchmarks/demand_cover.py --read runs/test/results.json         # tables of a comparison
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from selection import image
from tokensieve import Reduction, parse, reference, register
from tokensieve.evaluate import Results, Sample, compare
from tokensieve.evaluate.intervals import in_points
from tokensieve.measure import interleave, paired_ratio
from tokensieve.methods import Needs
from tokensieve.methods.demand_cover import DemandCover
from tokensieve.ops import top_k
from tokensieve.reference.benchmark import benchmark
from tokensieve.tokens import ConnectorTokens

WHOLE = "demand-cover"
NEEDS = Needs(cls_attention=-2, user_text=True)


@register("without-attention", paper="ablation", needs=NEEDS)
@dataclass(frozen=True)
class WithoutAttention(DemandCover):
    """Demand by distance to the mean token alone."""

    def salience(self, attention: Tensor, differences: Tensor) -> Tensor:
        return differences.square().sum(-1)


@register("without-distance", paper="ablation", needs=NEEDS)
@dataclass(frozen=True)
class WithoutDistance(DemandCover):
    """Demand by attention alone."""

    def salience(self, attention: Tensor, differences: Tensor) -> Tensor:
        return attention


@register("without-mean", paper="ablation", needs=NEEDS)
@dataclass(frozen=True)
class WithoutMean(DemandCover):
    """Tokens as they are, not their differences to the mean."""

    def differences(self, features: Tensor) -> Tensor:
        return features


@register("without-cover", paper="ablation", needs=NEEDS)
@dataclass(frozen=True)
class WithoutCover(DemandCover):
    """The tokens with the largest demand, whether or not they resemble each other."""

    def reduce(self, image: ConnectorTokens) -> Reduction:
        demand = self.demand(image, self.differences(image.features.float()))
        return image.keep(top_k(demand, image.budget), demand)


ABLATIONS = {
    WHOLE: "the whole method",
    "demand-cover(text_weight=0.0)": "no demand by words",
    "demand-cover(text_weight=1e6)": "no demand without words",
    "without-attention": "salience without attention",
    "without-distance": "salience without distance",
    "without-mean": "tokens instead of their differences to the mean",
    "without-cover": "the largest demand instead of coverage",
    "demand-cover(sharpness=1.0)": "plain cosines, `sharpness=1`",
    "demand-cover(contrast=1.0)": "`contrast=1`",
}


def ablate(args: argparse.Namespace) -> None:
    rows = benchmark("validation", args.scenes)
    # one function per scene: samples with equal images are questions about the same image
    images = {drawn: partial(getattr, drawn, "image") for row in rows for drawn in row.scenes}
    samples = [
        Sample(
            id=row.id,
            image=tuple(images[drawn] for drawn in row.scenes) if row.before else images[row.scene],
            question=row.question,
            answers=row.accepted,
            type=row.type,
            turns=row.turns,
        )
        for row in rows
    ]
    model, processor = reference.load()
    repair = None if args.repair == "none" else args.repair
    results = compare(
        model, processor, samples, list(ABLATIONS), args.keep, output=args.output, repair=repair, measure=False
    )
    for keep in args.keep:
        whole = results.row(WHOLE, keep)
        print(f"\n{keep:.0%}, {len(samples)} questions\n\n| | accuracy | minus the whole |\n|---|---|---|")
        for spec, meaning in ABLATIONS.items():
            row = results.row(spec, keep)
            gap = results.paired(row, whole)
            cell = "" if row is whole else in_points(gap.difference, gap.low, gap.high, sign="+")
            print(f"| {meaning} | {in_points(row.accuracy, row.accuracy_low, row.accuracy_high)} | {cell} |")


def read(file: Path) -> None:
    """Print the accuracy at each budget with the method's difference to it, and the accuracy by question type."""
    results = Results.load(file)
    types = list(dict.fromkeys(question.type for question in results.questions))
    keeps = sorted({row.keep for row in results.rows if isinstance(row.keep, float)}, reverse=True)
    names = list(dict.fromkeys(row.method for row in results.rows if row.keep is not None))
    print(f"{len(results.questions)} questions\n")
    print(f"| method | {' | '.join(f'{keep:.0%} | `{WHOLE}` minus it' for keep in keeps)} |")
    print(f"|---|{'---|' * 2 * len(keeps)}")
    for name in names:
        cells = []
        for keep in keeps:
            row = results.row(name, keep)
            gap = results.paired(results.row(WHOLE, keep), row)
            difference = "" if name == WHOLE else in_points(gap.difference, gap.low, gap.high, sign="+")
            cells.append(f"{in_points(row.accuracy, row.accuracy_low, row.accuracy_high)} | {difference}")
        print(f"| `{name}` | {' | '.join(cells)} |")
    for keep in keeps:
        print(f"\n| {keep:.0%} | {' | '.join(f'`{type}`' for type in types)} |\n|---|{'---|' * len(types)}")
        for row in [results.row(name, keep) for name in names]:
            scores = {score.type: f"{100 * score.accuracy:.0f}" for score in row.types}
            print(f"| `{row.method}` | {' | '.join(scores[type] for type in types)} |")


def clock(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    names = [WHOLE, "divprune", "scope", "mmtok", "cdpruner"]
    for total in args.tokens:
        tokens, methods = image(total, "cpu"), [parse(name, keep=64)[0] for name in names]
        with torch.inference_mode():
            times = interleave(
                [partial(method, tokens) for method in methods],
                repeats=args.repeats,
                device="cpu",
                clock=time.process_time,
            )
        for name, spent in zip(names, times, strict=True):
            ratio = paired_ratio(times[0], spent)
            print(
                f"| {total:,} | `{name}` | {median(spent):.1f} ms |"
                f" {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=100, help="validation scenes, 13 questions each")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.11, 0.05])
    parser.add_argument("--repair", choices=("none", "size", "restore"), default="size")
    parser.add_argument("--output", type=Path, default=Path("runs/demand-cover"))
    parser.add_argument("--time", action="store_true", help="measure times instead")
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--repeats", type=int, default=51)
    parser.add_argument("--read", type=Path, help="print the tables of these results instead")
    args = parser.parse_args()
    if args.read:
        read(args.read)
    elif args.time:
        clock(args)
    else:
        ablate(args)


if __name__ == "__main__":
    main()
