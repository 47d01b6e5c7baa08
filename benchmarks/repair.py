"""What repaired attention costs: prefill with ``repair`` ÷ the same prefill without it, and the same for decoding.

The method is attached each time, without repair, with "size" and with "restore", in turns in one process, on a
LLaVA-1.5-shaped model with random weights (CLIP-L/14-336 encoder, 576 tokens). Every ratio is of one round.

    python benchmarks/repair.py --repeats 9 --output benchmarks/results/repair-cpu.json
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokensieve
from script import parser_of, run_script
from shapes import LLM, build, prompt
from tokensieve.evaluate import environment
from tokensieve.measure import interleave, paired_ratio

WAYS = {"none": None, "size": "size", "restore": "restore"}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args.llm, getattr(torch, args.dtype), device)
    results = []
    for batch in args.batch:
        inputs = prompt(batch, model)

        def prefill(inputs: dict[str, Tensor] = inputs) -> Tensor:
            logits: Tensor = model(**inputs, logits_to_keep=1).logits
            return logits

        def answer(inputs: dict[str, Tensor] = inputs) -> Tensor:
            tokens: Tensor = model.generate(
                **inputs, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False, pad_token_id=0
            )
            return tokens

        around = [partial(tokensieve.attach, model, args.method, repair=repair) for repair in WAYS.values()]
        row: dict[str, Any] = {"batch": batch}
        calls = {"prefill": prefill, "answer": answer} if args.tokens else {"prefill": prefill}
        for name, call in calls.items():
            rounds: dict[str, Any] = {
                "repeats": args.repeats,
                "warmup": 1,
                "device": device,
                "clock": CLOCKS[args.clock],
            }
            times = interleave([call] * len(WAYS), around=around, **rounds)
            by_way = dict(zip(WAYS, times, strict=True))
            for way in ("size", "restore"):
                row[f"{name}_{way}_over_none"] = vars(paired_ratio(by_way[way], by_way["none"]))
            row[f"{name}_milliseconds"] = by_way
        print({key: value for key, value in row.items() if not key.endswith("milliseconds")}, flush=True)
        results.append(row)
    settings = {**vars(args), "output": None, "tokens_of_an_image": 576, "device": device}
    return {"settings": settings, "environment": environment(model), "results": results}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--llm", choices=["tiny", *LLM], default="mid")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--method", default="divprune(keep=64)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of an answer; 0: prefill alone")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: the process's own time, on a busy CPU"
    )
    parser.add_argument("--repeats", type=int, default=9)
    run_script(parser, run)


if __name__ == "__main__":
    main()
