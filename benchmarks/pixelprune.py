"""What PixelPrune saves on documents, tables and screens (``pages.py``), and on photograph-like noise.

For each kind of picture: the share of the visual tokens that leave, the time of the decision on the CPU, encoder and
prefill with the method ÷ without, interleaved, and the FLOPs ratio. The models are small Qwen-VLs with random weights.
The decision does not depend on weights; its time is inside the ratio.

    python benchmarks/pixelprune.py --output benchmarks/results/pixelprune-cpu.json
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial
from statistics import mean, median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import tokensieve
from pages import draw
from script import parser_of, run_script
from tokensieve.evaluate import environment
from tokensieve.measure import count_flops, interleave, paired_ratio
from tokensieve.models import EncodeCall, family_of
from tokensieve.tokens import VisualTokens

IMAGE, START, END, VOCABULARY, WORDS = 9, 7, 8, 1000, 40
PAGES = ("document", "table", "screen")
# name of the classes, patch side, image mean of its processor: Qwen3-VL's is 0.5, the older ones have CLIP's
MODELS = {"qwen3-vl": ("Qwen3VL", 16, [0.5] * 3), "qwen2.5-vl": ("Qwen2_5_VL", 14, None)}


def build(name: str, dtype: torch.dtype, device: str, tiny: bool) -> Any:
    """A small Qwen-VL with random weights; Qwen2.5-VL attends inside windows in three of four layers."""
    classes, patch, _ = MODELS[name]
    depth, width, wide = (4, 64, 64) if tiny else (8, 512, 1024)
    vision = {"depth": depth, "hidden_size": width, "intermediate_size": 4 * width, "num_heads": width // 64 or 1}
    vision |= {"out_hidden_size": wide, "patch_size": patch}
    if name == "qwen3-vl":
        vision |= {"deepstack_visual_indexes": [1, 2], "num_position_embeddings": 2304}
    else:
        vision |= {"window_size": 112, "fullatt_block_indexes": list(range(3, depth, 4))}
    sections = {"rope_type": "default", "mrope_section": [16, 8, 8], "rope_theta": 1e6}
    llm = {"hidden_size": wide, "intermediate_size": 3 * wide, "num_hidden_layers": depth, "vocab_size": VOCABULARY}
    llm |= {"num_attention_heads": wide // 64, "num_key_value_heads": wide // 64, "rope_parameters": sections}
    llm |= {"head_dim": 64} if name == "qwen3-vl" else {}
    config = getattr(transformers, f"{classes}Config")(
        vision_config=vision,
        text_config=llm,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return getattr(transformers, f"{classes}ForConditionalGeneration")._from_config(config, dtype=dtype).eval()


def prompt(name: str, model: Any, kind: str, seed: int, cells: tuple[int, int]) -> dict[str, Tensor]:
    """A picture of (height, width) visual tokens as its processor returns it, and a question of 40 words."""
    _, patch, mean_ = MODELS[name]
    picture = draw(kind, seed, (2 * patch * cells[1], 2 * patch * cells[0]))
    normalised = {} if mean_ is None else {"image_mean": mean_, "image_std": mean_}
    processor = Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=1, max_pixels=2**26, **normalised)
    pixels = processor(images=picture, return_tensors="pt")
    tokens = int(pixels["image_grid_thw"].prod()) // 4
    assert tokens == cells[0] * cells[1], "the processor must not resize: it would blur the edges"
    words = torch.randint(10, VOCABULARY, (1, WORDS), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([torch.tensor([[START, *[IMAGE] * tokens, END]]), words], 1)
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), **pixels}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return {key: value.to(model.device) for key, value in inputs.items()}


def decide(model: Any, spec: str, inputs: dict[str, Tensor]) -> Any:
    """Decide about the picture alone, on the CPU, as the method does inside an encode call."""
    call = EncodeCall(
        {"pixel_values": inputs["pixel_values"].cpu()}, encoder_inputs={"grid_thw": inputs["image_grid_thw"]}
    )
    (pixels,) = family_of(model).token_pixels(model, call, spec)
    (method,) = tokensieve.parse(spec)
    return method(VisualTokens(pixels.flatten(0, 1)[None], grid=(pixels.shape[0], pixels.shape[1])))[0]


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cells, results = (6, 5) if args.tiny else (32, 24), []
    for name in args.models:
        model = build(name, getattr(torch, args.dtype), device, args.tiny)
        for spec in args.methods:
            for kind in args.kinds:
                prompts = [prompt(name, model, kind, seed, cells) for seed in range(args.pictures)]
                left = [1 - decide(model, spec, inputs).slots / (cells[0] * cells[1]) for inputs in prompts]
                (deciding,) = interleave([partial(decide, model, spec, prompts[0])], repeats=args.repeats)
                # the picture whose share is nearest to the mean stands for its kind
                nearest = min(range(len(left)), key=lambda i: abs(left[i] - mean(left)))
                forward = partial(model, **prompts[nearest], logits_to_keep=1)
                attached = partial(tokensieve.attach, model, spec)
                full = count_flops(forward)
                with attached():
                    flops = count_flops(forward)
                times = interleave(
                    [forward] * 2, around=[nullcontext, attached], repeats=args.repeats, warmup=1, device=device
                )
                row = {
                    "model": name,
                    "method": spec,
                    "kind": kind,
                    "tokens": cells[0] * cells[1],
                    "share_that_leaves": left,
                    "mean_share_that_leaves": mean(left),
                    "picture_timed": nearest,
                    "decision_ms": {"median": median(deciding), "all": deciding},
                    "method_over_full": vars(paired_ratio(times[1], times[0])),
                    "flops_ratio": flops / full,
                    "milliseconds": dict(zip(("full", "method"), times, strict=True)),
                }
                print({k: v for k, v in row.items() if k not in ("milliseconds", "share_that_leaves")}, flush=True)
                results.append(row)
    pages = {
        f"{name} {spec}": mean(
            row["mean_share_that_leaves"]
            for row in results
            if (row["model"], row["method"]) == (name, spec) and row["kind"] in PAGES
        )
        for name in args.models
        for spec in args.methods
        if set(PAGES) <= set(args.kinds)
    }
    settings = {**vars(args), "output": None, "device": device}
    return {
        "settings": settings,
        "environment": environment(model),
        "share_that_leaves_of_pages": pages,
        "results": results,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=["pixelprune"])
    parser.add_argument("--kinds", nargs="+", default=[*PAGES, "noise"])
    parser.add_argument("--pictures", type=int, default=20, help="of each kind")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="only check that this script runs")
    run_script(parser, run)


if __name__ == "__main__":
    main()
