"""What reduction inside the vision tower saves: encoding with the method ÷ without, interleaved, and the FLOPs ratio.

A CLIP-L/14 tower at 336 px with random weights (576 patches, 24 layers, features from the 23rd) and a projector.
Both times are of ``get_image_features``; the method's own work (matching, merging, restoring the shape) is inside. The
third way is the *ideal*: the same tower on as many rows per layer, which it is simply given.

    python benchmarks/encoder.py --methods "tome(keep=0.25)" --batch 1 4 --output benchmarks/results/encoder-cpu.json
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tokensieve
from script import parser_of, run_script
from shapes import TINY, TOWER
from tokensieve.evaluate import environment
from tokensieve.measure import count_flops, interleave, paired_ratio


def build(dtype: torch.dtype, device: str, tiny: bool) -> LlavaForConditionalGeneration:
    """A LLaVA of which only tower and projector have their real size."""
    tower = TINY | {"image_size": 336, "patch_size": 14} if tiny else TOWER
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower), text_config=LlamaConfig(**TINY, vocab_size=100), image_token_id=9
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()


class Ideal(AbstractContextManager[None]):
    """Each layer's rows are cut to what the method left there, by a slice: no decision, no merge, no restoring."""

    def __init__(self, model: Any, counts: list[int]) -> None:
        self.tower, self.counts = model.model.vision_tower, counts

    def __enter__(self) -> None:
        layers = zip(self.tower.encoder.layers, self.counts, strict=True)
        self.handles = [
            layer.register_forward_pre_hook(lambda _, args, n=n: (args[0][:, : n + 1], *args[1:]))
            for layer, n in layers
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def entering(model: Any, spec: str, encode: Any) -> list[int]:
    """How many patches each layer of the tower is given under the method."""
    counts: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1] - 1))
        for layer in model.model.vision_tower.encoder.layers
    ]
    with tokensieve.attach(model, spec):
        encode()
    for handle in handles:
        handle.remove()
    return counts


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    model, results = build(dtype, device, args.tiny), []
    for batch in args.batch:
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(batch, 3, 336, 336, generator=generator).to(device, dtype)

        def encode(pixels: Tensor = pixels) -> Any:
            return model.model.get_image_features(pixels)

        full = count_flops(encode)
        for spec in args.methods:
            attached = partial(tokensieve.attach, model, spec)
            with attached():
                flops = count_flops(encode)
            counts = entering(model, spec, encode)
            ways = [nullcontext, attached, partial(Ideal, model, counts)]
            times = interleave([encode] * 3, around=ways, repeats=args.repeats, warmup=1, device=device)
            row = {
                "method": spec,
                "batch": batch,
                "patches_entering_each_layer": counts,
                "method_over_full": vars(paired_ratio(times[1], times[0])),
                "method_over_ideal": vars(paired_ratio(times[1], times[2])),
                "flops_ratio": flops / full,
                "milliseconds": dict(zip(("full", "method", "ideal"), times, strict=True)),
            }
            print(
                {k: v for k, v in row.items() if k not in ("milliseconds", "patches_entering_each_layer")}, flush=True
            )
            results.append(row)
    settings = {**vars(args), "output": None, "device": device}
    return {"settings": settings, "environment": environment(model), "results": results}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", default=["tome(keep=0.25)", "illava-encoder(keep=0.25)"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="only check that this script runs")
    run_script(parser, run)


if __name__ == "__main__":
    main()
