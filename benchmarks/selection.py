"""What each method's own decision costs: time and extra memory by number of tokens, and how they grow.

One image with random evidence (features of width 1,024, attention rows, keys of 16 heads, 16 words), no model around
it. The growth exponent is the slope of log time over log tokens from 2,880 tokens on (576 where a method goes no
further). For the greedy methods, the loop that the papers' public code runs is written out here, too.

    python benchmarks/selection.py --tokens 576 2880 20000 100000 --output benchmarks/results/selection-cpu.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from tokensieve import VisualTokens, parse
from tokensieve.measure import interleave, paired_ratio, peak_activation_bytes
from tokensieve.ops import normalise

WIDTH, HEADS, WORDS = 1024, 16, 16
# method and the most tokens it is meant for: dense clusters and all-pairs rounds stop at 20,000, rounds over all pairs
# that depend on the data at 2,880
METHODS = {
    "fastervlm": 100_000,
    "vtc-cls": 100_000,
    "trsm": 100_000,
    "hired": 100_000,
    "fopru": 100_000,
    "fopru(select='row')": 100_000,
    "holov": 100_000,
    "visionzip": 100_000,
    "divprune": 100_000,
    "cdpruner": 100_000,
    "prumerge": 20_000,
    "prumerge+": 20_000,
    "par": 20_000,
    "scope": 20_000,
    "mmtok": 20_000,
    "setok-cluster": 20_000,
    "vispruner": 2_880,
}


def image(total: int, device: str, seed: int = 0) -> VisualTokens:
    """One image of ``total`` tokens that form loose groups, as patches do."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.randn(64, WIDTH, generator=g)
    of = torch.randint(64, (total,), generator=g)
    rows = (groups[of] + 1.5 * torch.randn(total, WIDTH, generator=g)).to(device)[None]
    attention = torch.randn(1, total, generator=g).mul(2).softmax(-1).to(device)
    height = next(h for h in range(math.isqrt(total), 0, -1) if total % h == 0)
    return VisualTokens(
        rows,
        grid=(height, total // height),
        cls_attention=dict.fromkeys(range(24), attention),
        cls_wide={23: attention},
        received={22: attention},
        encoder_keys={layer: rows.view(1, total, HEADS, -1) for layer in (22, 23)},
        patches=rows,
        depth=24,
        text=torch.randn(1, WORDS, WIDTH, generator=g).to(device),
    )


def exponent(times: dict[int, float]) -> float | None:
    """Slope of log time over log tokens, from the larger sizes where there are enough."""
    sizes = [n for n in times if n >= 2880] if sum(n >= 2880 for n in times) > 1 else list(times)
    if len(sizes) < 2:
        return None
    x = torch.tensor([math.log(n) for n in sizes])
    y = torch.tensor([math.log(times[n]) for n in sizes])
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


# -- the loops of the papers' public codes, with their [N, N] matrices ------------------------------------------------


def divprune_loop(tokens: VisualTokens, k: int) -> Tensor:
    """The rows of all selected tokens are gathered again at every step."""
    rows = normalise(tokens.features[0])
    distance = 1 - rows @ rows.T
    chosen = torch.empty(k, dtype=torch.long, device=rows.device)
    for step in range(k):
        if step == 0:
            nearest = distance.topk(2, dim=0, largest=False).values[1]
        else:
            nearest = distance.index_select(0, chosen[:step]).amin(0)
        chosen[step] = nearest.argmax()
    return chosen.sort().values


def cdpruner_loop(tokens: VisualTokens, k: int) -> Tensor:
    """Incremental Cholesky on the kernel matrix."""
    rows = normalise(tokens.features[0])
    asked = normalise(tokens.words()[0][0].float().mean(0, keepdim=True))
    relevance = (rows @ asked.T).squeeze(-1)
    quality = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = quality[:, None] * (rows @ rows.T) * quality
    factors = torch.zeros(k, len(rows), device=rows.device)
    left, chosen = kernel.diagonal().clone(), []
    for step in range(k):
        best = left.argmax()
        chosen.append(best)
        projection = factors[:step, best] @ factors[:step]
        factors[step] = (kernel[best] - projection) / left[best].sqrt()
        left = left - factors[step].square()
        left[best] = -torch.inf
    return torch.stack(chosen).sort().values


def cover_loop(table: Tensor, k: int, weight: Tensor | None) -> Tensor:
    """Every token's gain anew at every step, on a copy of the table `[demands, N]` without the chosen columns."""
    covered, chosen = torch.zeros(len(table), device=table.device), []
    mask = torch.zeros(table.shape[1], dtype=torch.bool, device=table.device)
    for _ in range(k):
        open_table = table.clone()
        open_table[:, mask] = 0
        gain = (open_table - covered[:, None]).clamp(min=0).sum(0)
        gain = (gain if weight is None else gain * weight).masked_fill(mask, -torch.inf)
        best = gain.argmax()
        chosen.append(best)
        mask[best] = True
        covered = torch.maximum(covered, table[:, best])
    return torch.stack(chosen).sort().values


def scope_loop(tokens: VisualTokens, k: int) -> Tensor:
    rows = normalise(tokens.given("patches")[0])
    return cover_loop(rows @ rows.T, k, tokens.at("cls_attention", -2)[0])


def mmtok_loop(tokens: VisualTokens, k: int) -> Tensor:
    rows, words = normalise(tokens.given("patches")[0]), normalise(tokens.words()[0][0])
    asked = (words @ normalise(tokens.features[0]).T / 0.02).softmax(-1) / len(words)
    seen = 0.5 * (rows @ rows.T / 0.2).softmax(-1) / len(rows)
    return cover_loop(torch.cat([asked, seen]), k, None)


LOOPS = {"divprune": divprune_loop, "cdpruner": cdpruner_loop, "scope": scope_loop, "mmtok": mmtok_loop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880, 20_000, 100_000])
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="specs without keep")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with torch.inference_mode():
        report = {
            "torch": torch.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "device": given.device if given.device == "cpu" else torch.cuda.get_device_name(given.device),
            "threads": torch.get_num_threads(),
            "keep": given.keep,
            "width": WIDTH,
            "methods": {spec: costs(spec, given) for spec in given.methods},
            "loops": {name: against_loop(name, given) for name in LOOPS if name in given.methods},
        }
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(report, indent=1, default=str) + "\n")


def costs(spec: str, given: argparse.Namespace) -> dict[str, object]:
    """Time and memory of one method at every size that it is meant for."""
    times: dict[int, float] = {}
    extra: dict[int, float] = {}
    budget: dict[int, int] = {}
    (method,) = parse(spec)
    adaptive = getattr(method, "keep", None) is None
    for total in sorted(given.tokens):
        if total > METHODS.get(spec, 2_880):
            continue
        tokens = image(total, given.device)
        if not adaptive:
            (method,) = parse(spec, keep=given.keep)
        call, repeats = partial(method, tokens), given.repeats if total < 10_000 else 1
        (spent,) = interleave([call], repeats=repeats, warmup=1, device=given.device)
        times[total], extra[total] = median(spent), peak_activation_bytes(call, given.device) / 2**20
        budget[total] = call().slots
        print(
            f"{spec:24} {total:7,} -> {budget[total]:6,} tokens {times[total]:10.1f} ms {extra[total]:9.1f} MiB",
            flush=True,
        )
    slope = exponent(times)
    print(f"{spec:24} grows as N^{slope:.2f}" if slope is not None else f"{spec:24} one size only", flush=True)
    return {"ms": times, "peak_mib": extra, "kept": budget, "exponent": slope}


def against_loop(name: str, given: argparse.Namespace) -> dict[str, object]:
    """Our selection and the public code's loop at 576 tokens, interleaved; both must choose the same."""
    tokens, (method,) = image(576, given.device), parse(name, keep=given.keep)
    calls = [partial(LOOPS[name], tokens, given.keep), partial(method, tokens)]
    if not torch.equal(calls[0](), calls[1]().kept[0]):
        raise SystemExit(f"{name}: our choice differs from the public loop's")
    loop, ours = interleave(calls, repeats=max(5, given.repeats), device=given.device)
    ratio = paired_ratio(loop, ours)
    print(
        f"{name:24} 576 tokens: loop {median(loop):.1f} ms, ours {median(ours):.1f} ms, "
        f"{ratio.median:.1f}x [{ratio.low:.1f}, {ratio.high:.1f}]",
        flush=True,
    )
    return {
        "loop_ms": median(loop),
        "ours_ms": median(ours),
        "ratio": ratio.median,
        "quartiles": [ratio.low, ratio.high],
    }


if __name__ == "__main__":
    main()
