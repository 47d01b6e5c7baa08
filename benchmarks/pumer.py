"""What PuMer saves: throughput, FLOPs and memory, with reducers on against the same model without.

Full-size random weights at the papers' shapes and the published settings; reduced and unreduced calls take turns in
one process. The FLOP count is the limit: a reducer that cost nothing would be faster by just that ratio. Memory is the
peak of activations in inference, and what a training step's forward keeps for its backward. Inference peaks where the
widest layer is, which may be one before the first reducer: then it saves nothing there, and the output says so.

    python benchmarks/pumer.py --batch 1 8 32 --repeats 7 --output benchmarks/results/pumer-cpu.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForImageAndTextRetrieval,
    ViltConfig,
    ViltForQuestionAnswering,
)

import tokensieve
from script import parser_of, run_script
from tokensieve.evaluate import environment
from tokensieve.fusion.meter import MeterConfig, MeterForQuestionAnswering
from tokensieve.measure import count_flops, interleave, paired_ratio, peak_activation_bytes

WORDS = 40


@dataclass(frozen=True)
class Shape:
    """A model at its paper's size, or a tiny one of the same kind; its image side in px, and PuMer's settings."""

    make: Callable[[bool], Any]
    side: int
    specs: tuple[str, ...]


def vilt(tiny: bool) -> ViltForQuestionAnswering:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4} if tiny else {}
    return ViltForQuestionAnswering(ViltConfig(num_labels=3129, **small))


def meter(tiny: bool) -> MeterForQuestionAnswering:
    config = MeterConfig(num_labels=3129)
    if tiny:
        size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        text = {**size, "num_hidden_layers": 2, "vocab_size": 50265, "max_position_embeddings": 514}
        vision = {**size, "num_hidden_layers": 2, "image_size": 384, "patch_size": 16}
        config = MeterConfig(num_labels=9, **size, text_config=text, vision_config=vision)
    return MeterForQuestionAnswering(config)


def bridgetower(tiny: bool) -> BridgeTowerForImageAndTextRetrieval:
    if not tiny:
        return BridgeTowerForImageAndTextRetrieval(BridgeTowerConfig())
    size = {"hidden_size": 64, "num_attention_heads": 4}
    text = {**size, "intermediate_size": 128, "num_hidden_layers": 7}
    config = BridgeTowerConfig(**size, text_config=text, vision_config={"hidden_size": 64, "num_hidden_layers": 7})
    return BridgeTowerForImageAndTextRetrieval(config)


SHAPES = {
    "vilt": Shape(
        vilt,
        384,
        (
            "pumer(layers=(2, 5, 8), prune=0.1, merge=0.3, merge_text=0.2)",
            "pumer(layers=(2, 4, 6, 8), prune=0.1, merge=0.3, merge_text=0.2)",
        ),
    ),
    "meter": Shape(
        meter,
        384,
        (
            "pumer(layers=(0, 1, 2, 3), prune=0.2, merge=0.2, merge_text=0.2)",
            "pumer(layers=(0, 1, 2, 3), prune=0.3, merge=0.5, merge_text=0.2)",
        ),
    ),
    "bridgetower": Shape(bridgetower, 288, ("pumer(layers=(0, 1, 2, 3), prune=0.2, merge=0.2, merge_text=0.2)",)),
}


def batch_of(size: int, side: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Texts of 40 tokens and square images, as the published runs pad them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 30000, (size, WORDS), generator=generator)
    pixels = torch.randn(size, 3, side, side, generator=generator)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels.to(device, dtype),
    }


def compare(model: Any, inputs: dict[str, Tensor], spec: str, repeats: int, device: str) -> dict[str, Any]:
    """One row: the reduced call against the unreduced one."""
    call = partial(model, **inputs)
    reduced = partial(tokensieve.attach, model, spec)
    full_ms, reduced_ms = interleave(
        [call, call], around=[nullcontext, reduced], repeats=repeats, warmup=1, device=device
    )
    flops, peak, kept = count_flops(call), peak_activation_bytes(call, device), for_backward(call, device)
    with reduced() as sieve:
        less_flops, less_peak = count_flops(call), peak_activation_bytes(call, device)
        less_kept = for_backward(call, device)
        left, total = sieve.last[0][0].slots, sieve.last[0][0].total
    speedup, limit = paired_ratio(full_ms, reduced_ms), flops / less_flops
    rows = len(inputs["input_ids"])
    return {
        "spec": spec,
        "batch": rows,
        "image_tokens": [total, left],
        "throughput_ratio": vars(speedup),
        "flop_limit": limit,
        "share_of_limit": speedup.median / limit,
        "peak_activation_ratio": less_peak / peak,
        "training_activation_ratio": less_kept / kept,
        "peak_activation_mb": [peak / 1e6, less_peak / 1e6],
        "training_activation_mb": [kept / 1e6, less_kept / 1e6],
        "milliseconds": {"full": full_ms, "reduced": reduced_ms},
    }


def for_backward(call: Callable[[], Any], device: str) -> int:
    """Peak bytes of a forward that keeps its activations for a backward."""
    with torch.enable_grad():
        return peak_activation_bytes(call, device)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    results = []
    for name in args.models:
        shape = SHAPES[name]
        torch.manual_seed(0)
        model = shape.make(args.tiny).to(device, dtype).eval()
        for size in args.batch:
            inputs = batch_of(size, shape.side, device, dtype)
            for spec in shape.specs:
                row = {"model": name, **compare(model, inputs, spec, args.repeats, device)}
                results.append(row)
                print(summary(row), flush=True)
    settings = {**vars(args), "output": None, "words": WORDS, "device": device}
    return {"settings": settings, "environment": environment(model), "results": results}


def summary(row: dict[str, Any]) -> str:
    speed, limit = row["throughput_ratio"], row["flop_limit"]
    before, after = row["image_tokens"]
    inference, training = row["peak_activation_ratio"], row["training_activation_ratio"]
    claim = "reached" if speed["median"] >= 2 and min(training, inference) <= 0.5 else "not reached"
    return (
        f"{row['model']} {row['spec']} batch {row['batch']}: {before} to {after} image tokens, "
        f"throughput {speed['median']:.2f}x ({speed['low']:.2f} to {speed['high']:.2f}) of at most {limit:.2f}x "
        f"by FLOPs ({row['share_of_limit']:.0%}), peak memory {inference:.0%}, in training {training:.0%}; "
        f"the paper's 'up to 2x, -50 %': {claim}"
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="small models: only checks that this script runs")
    run_script(parser, run)


if __name__ == "__main__":
    main()
