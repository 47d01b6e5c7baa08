"""What a second question costs: decided anew (``reselect=True``) ÷ a fresh prompt, and ÷ plain continuation.

A question of 20 tokens, and an answer of 8 before it, follow a first turn of a LLaVA-1.5-shaped model with random
weights (CLIP-L/14-336 encoder, 576 tokens). Four ways to its first logits, in turns in one process; every ratio is of
one round:

- continued: on the cache of the first turn, with the tokens of the first question;
- reselect: on the same cache, with tokens chosen anew;
- fresh: the whole conversation with its image, without a cache;
- reentered: K more rows beside the question on the first cache, the cost of appending chosen rows (another answer).

    python benchmarks/turns.py --repeats 9 --output benchmarks/results/turns-cpu.json
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokensieve
from script import parser_of, run_script
from shapes import LLM, VOCABULARY, build, prompt
from tokensieve.evaluate import environment
from tokensieve.measure import count_flops, interleave, paired_ratio

ANSWER, QUESTION = 8, 20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Ways:
    """The ways to the logits of the second question; each call needs its context, which copies the first cache."""

    def __init__(self, model: Any, method: str, keep: int, batch: int) -> None:
        self.model, self.method, self.keep = model, f"{method}(keep={keep})", keep
        self.inputs = prompt(batch, model)
        generator = torch.Generator().manual_seed(2)
        self.words = torch.randint(10, VOCABULARY, (batch, ANSWER + QUESTION), generator=generator).to(model.device)
        self.first: dict[bool, Any] = {}
        for reselect in (False, True):
            with tokensieve.attach(model, self.method, reselect=reselect):
                self.first[reselect] = model(**self.inputs, logits_to_keep=1).past_key_values
        self.cache: Any = None

    @contextmanager
    def attached(self, reselect: bool) -> Iterator[None]:
        """Attach the method, and copy the cache of the first turn."""
        with tokensieve.attach(self.model, self.method, reselect=reselect):
            self.cache = copy.deepcopy(self.first[reselect])
            yield
        self.cache = None

    def on_cache(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self.words, past_key_values=self.cache, logits_to_keep=1).logits
        return logits

    def fresh(self) -> Tensor:
        ids = torch.cat([self.inputs["input_ids"], self.words], 1)
        logits: Tensor = self.model(**{**self.inputs, "input_ids": ids}, logits_to_keep=1).logits
        return logits

    def reentered(self) -> Tensor:
        ids = torch.cat([self.words[:, :1].expand(-1, self.keep), self.words], 1)
        logits: Tensor = self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits
        return logits


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args.llm, getattr(torch, args.dtype), device)
    results = []
    for keep in args.keep:
        ways = Ways(model, args.method, keep, args.batch)
        plain, anew = partial(ways.attached, False), partial(ways.attached, True)
        calls = {
            "continued": (ways.on_cache, plain),
            "reselect": (ways.on_cache, anew),
            "fresh": (ways.fresh, plain),
            "reentered": (ways.reentered, plain),
        }
        with anew():
            decided = ways.on_cache()
        with plain():
            difference = float((decided - ways.fresh()).abs().max())
        row: dict[str, Any] = {"keep": keep, "largest_difference_from_fresh": difference}
        row["bytes_of_an_image"] = ways.first[True]._tokensieve_cache_info.conversation.nbytes // args.batch
        gflops = {}
        for name, (call, context) in calls.items():
            with context():
                gflops[name] = count_flops(call) / 1e9
        times = interleave(
            [call for call, _ in calls.values()],
            around=[context for _, context in calls.values()],
            repeats=args.repeats,
            warmup=1,
            device=device,
            clock=CLOCKS[args.clock],
        )
        by_way = dict(zip(calls, times, strict=True))
        for other in ("fresh", "continued", "reentered"):
            row[f"reselect_over_{other}"] = vars(paired_ratio(by_way["reselect"], by_way[other]))
        print(row, {name: round(value, 1) for name, value in gflops.items()}, flush=True)
        results.append({**row, "gflops": gflops, "milliseconds": by_way})
        del ways
    settings = {**vars(args), "output": None, "tokens_of_an_image": 576, "answer": ANSWER, "question": QUESTION}
    return {"settings": {**settings, "device": device}, "environment": environment(model), "results": results}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--llm", choices=["tiny", *LLM], default="mid")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--method", default="trsm")
    parser.add_argument("--keep", type=int, nargs="+", default=[64, 144])
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: the process's own time, on a busy CPU"
    )
    parser.add_argument("--repeats", type=int, default=9)
    run_script(parser, run)


if __name__ == "__main__":
    main()
