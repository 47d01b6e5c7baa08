"""What each method's own decision costs: time and extra memory by number of tokens, and how they grow.

One image with random evidence (features of width 1,024, attention rows, keys of 16 heads, 16 words), no model around
it. The growth exponent is the slope of log time over log tokens from 2,880 tokens on. For the greedy methods the loops
that the papers' public codes run are written out here, too, and take turns with ours in one process. On a CPU with one
thread, time is the process's CPU time, so that others on the machine count less.

    python benchmarks/selection.py --threads 1 --runs 2 --output benchmarks/results/selection-cpu.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from tokensieve import __version__, list_methods, parse
from tokensieve.measure import interleave, paired_ratio, peak_activation_bytes
from tokensieve.methods import Method
from tokensieve.ops import normalise
from tokensieve.tokens import ByLayer, ConnectorTokens, UserText
from tokensieve.tokens import given as evidence_of

WIDTH, HEADS, WORDS = 1024, 16, 16
VARIANTS = ("fopru(select='row')",)
# quadratic in time: every token is compared with every other, or with a share of them
QUADRATIC = ("divprune", "scope", "mmtok", "demand-cover", "vispruner", "prumerge", "prumerge+", "par", "setok-cluster")
SLOW = 10_000  # milliseconds from which a call is timed once, without a warm-up


def image(total: int, device: str, seed: int = 0) -> ConnectorTokens:
    """One image of ``total`` tokens that form loose groups, as patches do."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.randn(64, WIDTH, generator=g)
    of = torch.randint(64, (total,), generator=g)
    rows = (groups[of] + 1.5 * torch.randn(total, WIDTH, generator=g)).to(device)[None]
    attention = torch.randn(1, total, generator=g).mul(2).softmax(-1).to(device)
    height = next(h for h in range(math.isqrt(total), 0, -1) if total % h == 0)
    words = torch.randn(1, WORDS, WIDTH, generator=g).to(device)
    return ConnectorTokens(
        rows,
        grid=(height, total // height),
        cls_attention=ByLayer(dict.fromkeys(range(24), attention), 24),
        cls_similarity=attention,
        cls_attention_single_head=ByLayer({23: attention}, 24),
        attention_received=ByLayer({22: attention}, 24),
        encoder_keys=ByLayer({layer: rows.view(1, total, HEADS, -1) for layer in (22, 23)}, 24),
        patches=rows,
        user_text=UserText(words, torch.ones(1, WORDS, dtype=torch.bool, device=device)),
    )


def exponent(times: dict[int, float]) -> float | None:
    """Slope of log time over log tokens, from 2,880 tokens on; ``None`` where there are fewer than two sizes."""
    sizes = [n for n in times if n >= 2880]
    if len(sizes) < 2:
        return None
    x = torch.tensor([math.log(n) for n in sizes])
    y = torch.tensor([math.log(times[n]) for n in sizes])
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


# -- the loops of the papers' public codes, with their [N, N] matrices ------------------------------------------------


def divprune_loop(tokens: ConnectorTokens, k: int) -> Tensor:
    """The rows of all selected tokens are gathered again at every step, and searched with their positions."""
    rows = tokens.features[0] / tokens.features[0].norm(dim=1, keepdim=True)
    distance = 1 - rows @ rows.T
    chosen = torch.empty(k, dtype=torch.long, device=rows.device)
    for step in range(k):
        if step == 0:
            nearest = distance.topk(2, dim=0, largest=False).values[1]
        else:
            so_far = chosen.index_select(0, torch.arange(step, device=rows.device))
            nearest = distance.index_select(0, so_far).min(dim=0).values
        chosen[step] = nearest.argmax()
    return chosen.sort().values


def cdpruner_loop(tokens: ConnectorTokens, k: int) -> Tensor:
    """Incremental Cholesky on the kernel matrix of a batch."""
    rows = normalise(tokens.features)
    b, n, _ = rows.shape
    every = torch.arange(b, device=rows.device)
    asked = normalise(evidence_of(tokens.user_text).features.float().mean(1, keepdim=True))
    relevance = (rows @ asked.transpose(1, 2)).squeeze(-1)
    quality = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = quality[:, :, None] * (rows @ rows.transpose(1, 2)) * quality[:, None]
    factors = torch.zeros(k, b, n, device=rows.device)
    left, chosen = kernel.diagonal(dim1=1, dim2=2).clone(), []
    for step in range(k):
        best = left.argmax(-1)
        chosen.append(best)
        projection = torch.einsum("tb,tbn->bn", factors[:step, every, best], factors[:step])
        factors[step] = (kernel[every, best] - projection) / left[every, best].sqrt()[:, None]
        left -= factors[step].square()
        left[every, best] = -torch.inf
    return torch.stack(chosen, 1).sort().values[0]


def scope_loop(tokens: ConnectorTokens, k: int) -> Tensor:
    """Every token's gain anew at every step, on a masked copy of the matrix of a batch."""
    rows = normalise(evidence_of(tokens.patches))
    cosines, attention = rows @ rows.transpose(1, 2), tokens.cls_attention[-2]
    b, n = attention.shape
    every, zero = torch.arange(b, device=rows.device), torch.zeros(1, device=rows.device)
    covered, taken = torch.zeros_like(attention), torch.zeros(b, n, dtype=torch.bool, device=rows.device)
    chosen = torch.empty(b, k, dtype=torch.long, device=rows.device)
    for step in range(k):
        gain = torch.maximum(zero, cosines.masked_fill(taken[:, None], 0) - covered[:, :, None]).sum(1)
        best = (gain * attention).masked_fill(taken, -torch.inf).argmax(1)
        taken[every, best] = True
        chosen[:, step] = best
        covered = torch.maximum(covered, cosines[every, best])
    return chosen.sort().values[0]


def mmtok_loop(tokens: ConnectorTokens, k: int) -> Tensor:
    """Every token's gain anew at every step, on the table of all demands."""
    rows, words = normalise(evidence_of(tokens.patches)[0]), normalise(evidence_of(tokens.user_text).features[0])
    asked = (words @ normalise(tokens.features[0]).T / 0.02).softmax(-1) / len(words)
    seen = 0.5 * (rows @ rows.T / 0.2).softmax(-1) / len(rows)
    table = torch.cat([asked, seen])
    covered, taken = torch.zeros(len(table), device=rows.device), torch.zeros(len(rows), device=rows.device)
    chosen = torch.zeros(k, dtype=torch.long, device=rows.device)
    for step in range(k):
        gain = (table - covered[:, None]).clamp_min_(0).sum(0).add_(taken)
        best = gain.argmax().view(1)
        chosen[step] = best.squeeze()
        taken.scatter_(0, best, -torch.inf)
        covered = torch.maximum(covered, table.index_select(1, best).squeeze(1))
    return chosen.sort().values


LOOPS = {"divprune": divprune_loop, "cdpruner": cdpruner_loop, "scope": scope_loop, "mmtok": mmtok_loop}


# -- measuring --------------------------------------------------------------------------------------------------------


def main() -> None:
    known = [
        m.name for m in list_methods() if m.stage == "connector" and m.name != "full" and not m.needs.requests("video")
    ]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880, 20_000, 100_000])
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=[*known, *VARIANTS], help="specs without keep")
    parser.add_argument("--most-quadratic", type=int, default=20_000, help="most tokens for methods of quadratic time")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=51, help="repeats against a public code's loop")
    parser.add_argument("--runs", type=int, default=1, help="times that everything is measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    report = {"command": " ".join(["python benchmarks/selection.py", *sys.argv[1:]]), "environment": environment(given)}
    report |= {"clock": clock_for(given).__name__, "keep": given.keep, "width": WIDTH, "repeats": given.repeats}
    report["runs"] = []
    for _ in range(given.runs):
        with torch.inference_mode():
            loops = {name: against_loop(name, given) for name in LOOPS if name in given.methods}
            report["runs"].append({"loops": loops, "methods": {spec: costs(spec, given) for spec in given.methods}})
        if given.output:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            given.output.write_text(json.dumps(report, indent=1) + "\n")


def environment(given: argparse.Namespace) -> dict[str, object]:
    """Versions and hardware; names no host and no path."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return {
        "tokensieve": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "device": given.device if given.device == "cpu" else torch.cuda.get_device_name(given.device),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def clock_for(given: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if given.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def method_of(spec: str, keep: int) -> Method:
    """The method at the budget, if it has one by default."""
    (method,) = parse(spec)
    return method if getattr(method, "keep", None) is None else parse(spec, keep=keep)[0]


def costs(spec: str, given: argparse.Namespace) -> dict[str, object]:
    """Time and memory of one method at every size that it is meant for."""
    times: dict[int, float] = {}
    extra: dict[int, float] = {}
    kept: dict[int, int] = {}
    most = given.most_quadratic if spec.split("(")[0] in QUADRATIC else max(given.tokens)
    for total in sorted(n for n in given.tokens if n <= most):
        method, tokens = method_of(spec, given.keep), image(total, given.device)

        def call(method: Method = method, tokens: ConnectorTokens = tokens) -> None:
            kept[len(tokens.features[0])] = method(tokens).slots

        clock = clock_for(given)
        start = clock()
        extra[total] = peak_activation_bytes(call, given.device) / 2**20  # warms up, too
        times[total] = (clock() - start) * 1e3
        if times[total] < SLOW:
            repeats = given.repeats if total <= 2880 else 3
            (spent,) = interleave([call], repeats=repeats, warmup=0, device=given.device, clock=clock)
            times[total] = median(spent)
        print(f"{spec:24} {total:7,} tokens {times[total]:10.1f} ms {extra[total]:9.1f} MiB", flush=True)
    slope = exponent(times)
    print(f"{spec:24} grows as N^{slope:.2f}" if slope is not None else f"{spec:24} too few sizes", flush=True)
    return {"ms": times, "peak_mib": extra, "kept": kept, "exponent": slope}


def against_loop(name: str, given: argparse.Namespace) -> dict[str, object]:
    """Our selection and the public code's loop at 576 tokens, interleaved; both must choose the same."""
    tokens, method = image(576, given.device), method_of(name, given.keep)
    calls = [partial(LOOPS[name], tokens, given.keep), partial(method, tokens)]
    if not torch.equal(calls[0](), calls[1]().kept[0]):
        raise SystemExit(f"{name}: our choice differs from the public loop's")
    rows = tokens.features[0]
    pairs = partial(torch.mm, rows, rows.T)  # what the loops start with
    loop, ours, gram = interleave([*calls, pairs], repeats=given.pairs, device=given.device, clock=clock_for(given))
    ratio = paired_ratio(loop, ours)
    print(
        f"{name:24} 576 tokens: loop {median(loop):.1f} ms ({median(gram):.1f} of it all pairs), "
        f"ours {median(ours):.1f} ms, {ratio.median:.1f}x [{ratio.low:.1f}, {ratio.high:.1f}]",
        flush=True,
    )
    return {"loop_ms": median(loop), "ours_ms": median(ours), "all_pairs_ms": median(gram), "ratio": vars(ratio)}


if __name__ == "__main__":
    main()
