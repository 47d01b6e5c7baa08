"""The equivalence checks (laws) in one precision, with each attention kernel, on the bundled and on tiny random models.

A kernel that is not installed, or that this device or model lacks, is reported as unavailable, with the reason.

    python benchmarks/laws.py --dtype bfloat16 --output laws.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import is_flash_attn_2_available

from script import parser_of, run_script
from shapes import TOY_SHAPES
from tokensieve.check import Laws
from tokensieve.commands.check import METHODS, QUESTIONS, prompts
from tokensieve.evaluate import environment
from tokensieve.reference import path

KERNELS = ("sdpa", "eager", "flash_attention_2", "flex_attention")
WORDS = 3, 9, 5  # after the image of each prompt
RANDOM = {  # what needs no processor
    "llava-next-7b": ("fastervlm(keep=0.25)", "divprune(keep=0.25)", "fastv(layer=1, keep=0.25)"),
    "qwen2.5-vl-7b": ("divprune(keep=0.25)", "fastv(layer=1, keep=0.25)"),
}


def missing(kernel: str, dtype: str, device: str) -> str:
    """Return why a kernel cannot run here; empty if it can."""
    if kernel == "flash_attention_2":
        if device != "cuda":
            return "needs a CUDA device"
        if not is_flash_attn_2_available():
            return "the package flash-attn is not installed"
        if dtype == "float32":
            return "has no float32"
    if kernel == "flex_attention" and device != "cuda":
        return "needs a CUDA device: torch compiles it there"
    return ""


def models(kernel: str, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Any, Laws, Sequence[str]]]:
    """Yield (name, model, its laws, specs)."""
    folder = path("reference")
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation=kernel)
    model, processor = model.to(device).eval(), AutoProcessor.from_pretrained(folder)
    yield "reference", model, Laws(model, prompts(processor, model), len(QUESTIONS), processor), METHODS
    for name, specs in RANDOM.items():
        shape = TOY_SHAPES[name]
        model = shape.build(dtype, device, kernel)
        laws = Laws(
            model, lambda numbers, s=shape, m=model: s.prompts(m, [WORDS[n] for n in numbers], numbers), len(WORDS)
        )
        yield f"{name} (tiny)", model, laws, specs


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: list[dict[str, Any]] = []
    versions: dict[str, Any] = {}
    for kernel in args.kernels:
        if reason := missing(kernel, args.dtype, device):
            results.append({"kernel": kernel, "status": "unavailable", "reason": reason})
            continue
        for name, model, laws, specs in models(kernel, getattr(torch, args.dtype), device):
            versions = environment(model)
            for spec in specs[: args.methods]:
                given = {} if "keep" in spec else {"keep": 0.25}
                verdicts = [asdict(verdict) for verdict in laws.check(spec, **given)]
                results.append({"kernel": kernel, "model": name, "method": spec, "verdicts": verdicts})
                failed = [verdict["law"] for verdict in verdicts if verdict["status"] == "FAIL"]
                print(kernel, name, spec, f"FAIL: {failed}" if failed else "pass or refused", flush=True)
    settings = {**vars(args), "output": None, "device": device}
    return {"settings": settings, "environment": versions, "results": results}


def main() -> None:
    parser = parser_of(__doc__, threads=None)
    parser.add_argument("--kernels", choices=KERNELS, nargs="+", default=list(KERNELS))
    parser.add_argument("--methods", type=int, help="at most so many methods per model")
    run_script(parser, run)


if __name__ == "__main__":
    main()
