"""What FastV costs beyond its limit: prefill with the method ÷ a run whose later blocks get the short sequence anyway.

Three ways to the same logits, interleaved in one process on a LLaVA-1.5-shaped model with random weights (576 tokens):
the attached method; the *ideal*, a hand-written loop over the same blocks that leaves at block K to places known
beforehand and scores nothing; and the *eager* way of public code, the same loop in which the attention of block K-1
runs a second time, eagerly, to get at its probabilities (public code runs the whole block again: slower still).

    python benchmarks/decoder.py --batch 1 8 --repeats 7 --output benchmarks/results/decoder-cpu.json
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import tokensieve
from script import parser_of, run_script
from shapes import LLM, PROMPT, build, prompt
from tokensieve.evaluate import environment
from tokensieve.measure import interleave, paired_ratio

IMAGE_TOKENS = 576
Choose = Callable[[Tensor, Any], Tensor]
"""From what entered the block before, and the rotary embedding, to the columns `[B, n]` that stay."""


def by_blocks(model: Any, inputs: dict[str, Tensor], layer: int, choose: Choose) -> Tensor:
    """Prefill block by block, with a cache; before block ``layer`` only the chosen columns stay. No padding."""
    base, decoder = model.model, model.model.language_model
    features = base.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    visual = (inputs["input_ids"] == model.config.image_token_id)[..., None]
    hidden = model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(visual, torch.cat(list(features)))
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    rotary, cache, entered = decoder.rotary_emb(hidden, positions), DynamicCache(config=decoder.config), hidden
    for number, block in enumerate(decoder.layers):
        if number == layer:
            columns = choose(entered, rotary)[..., None]
            hidden = hidden.take_along_dim(columns, 1)
            cos, sin = (part.take_along_dim(columns, 1) for part in rotary)
            rotary = cos, sin
        entered = hidden
        hidden = block(hidden, position_embeddings=rotary, past_key_values=cache, use_cache=True)
    logits: Tensor = model.lm_head(decoder.norm(hidden[:, -1:]))
    return logits


def columns_of(kept: Tensor, length: int) -> Tensor:
    """Columns that stay when of each image `kept` `[B, K]` does."""
    start = torch.arange(PROMPT, device=kept.device).expand(len(kept), -1)
    end = torch.arange(PROMPT + IMAGE_TOKENS, length, device=kept.device).expand(len(kept), -1)
    return torch.cat([start, PROMPT + kept, end], 1)


def eager_scores(model: Any, layer: int, entered: Tensor, rotary: Any) -> Tensor:
    """Run the attention of block ``layer - 1`` again, eagerly, for the last token's row: `[B, 576]`."""
    block, length = model.model.language_model.layers[layer - 1], entered.shape[1]
    attention = copy.copy(block.self_attn)
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation_internal = "eager"
    future = torch.full((length, length), torch.finfo(entered.dtype).min, dtype=entered.dtype, device=entered.device)
    _, probabilities = attention(
        block.input_layernorm(entered), position_embeddings=rotary, attention_mask=future.triu(1)[None, None]
    )
    scores: Tensor = probabilities.mean(1)[:, -1, PROMPT : PROMPT + IMAGE_TOKENS]
    return scores


def candidates(model: Any, inputs: dict[str, Tensor], spec: str, layer: int) -> dict[str, Callable[[], Tensor]]:
    """The three ways; the ideal's places are those the method chose once before."""
    with tokensieve.attach(model, spec) as sieve:
        model(**inputs, logits_to_keep=1)
        kept = torch.stack([row[0].kept for row in sieve.last])
    length = inputs["input_ids"].shape[1]
    known = columns_of(kept, length)

    def method() -> Tensor:
        logits: Tensor = model(**inputs, logits_to_keep=1).logits
        return logits

    def ideal() -> Tensor:
        return by_blocks(model, inputs, layer, lambda entered, rotary: known)

    def eager() -> Tensor:
        def choose(entered: Tensor, rotary: Any) -> Tensor:
            scores = eager_scores(model, layer, entered, rotary)
            return columns_of(scores.topk(kept.shape[1]).indices.sort(-1).values, length)

        return by_blocks(model, inputs, layer, choose)

    return {"method": method, "ideal": ideal, "eager": eager}


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args.llm, getattr(torch, args.dtype), device)
    spec, results = f"fastv(layer={args.layer}, keep={args.keep})", []
    for batch in args.batch:
        inputs = prompt(batch, model)
        ways = candidates(model, inputs, spec, args.layer)
        around = [partial(tokensieve.attach, model, spec), nullcontext, nullcontext]
        with tokensieve.attach(model, spec):
            mine = ways["method"]()
        apart = {way: (mine - ways[way]()).abs().max().item() / mine.std().item() for way in ("ideal", "eager")}
        times = interleave(list(ways.values()), around=around, repeats=args.repeats, warmup=1, device=device)
        by_way = dict(zip(ways, times, strict=True))
        row = {
            "batch": batch,
            "method_over_ideal": vars(paired_ratio(by_way["method"], by_way["ideal"])),
            "eager_over_method": vars(paired_ratio(by_way["eager"], by_way["method"])),
            "milliseconds": by_way,
            "logit_difference_over_std": apart,
        }
        print({k: v for k, v in row.items() if k != "milliseconds"}, flush=True)
        results.append(row)
    settings = {**vars(args), "output": None, "tokens": IMAGE_TOKENS, "device": device}
    return {"settings": settings, "environment": environment(model), "results": results}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--llm", choices=["tiny", *LLM], default="mid")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--layer", type=int, default=2, help="first block that sees the shorter sequence")
    parser.add_argument("--repeats", type=int, default=7)
    run_script(parser, run)


if __name__ == "__main__":
    main()
