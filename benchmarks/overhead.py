"""What a method costs beyond its limit: prefill with the method ÷ the same model given only the K kept tokens.

Three ways to the same logits, interleaved in one process on a LLaVA-1.5-shaped model with random weights
(CLIP-L/14-336 tower, 576 tokens): the attached method; the *oracle*, the unhooked model fed the tower's features at K
places known beforehand; and the *eager* way, where the whole tower runs with ``output_attentions=True`` to get one row.

    python benchmarks/overhead.py --batch 1 8 --repeats 7 --output benchmarks/results/overhead-cpu.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokensieve
from script import parser_of, run_script
from shapes import LLM, PROMPT, build, prompt
from tokensieve.evaluate import environment
from tokensieve.measure import interleave, paired_ratio


def short_forward(model: Any, inputs: dict[str, Tensor], features: Tensor, kept: Tensor) -> Tensor:
    """The unhooked model on `[B, K, D]` features that stand at ``kept`` `[B, K]` of their images."""
    ids, batch = inputs["input_ids"], len(kept)
    start = torch.arange(PROMPT, device=ids.device).expand(batch, -1)
    end = torch.arange(PROMPT + 576, ids.shape[1], device=ids.device).expand(batch, -1)
    columns = torch.cat([start, PROMPT + kept, end], 1)
    encoded = type("Encoded", (), {"pooler_output": list(features)})()
    output = model(
        input_ids=ids.gather(1, columns),
        position_ids=columns,
        attention_mask=torch.ones_like(columns),
        mm_encoder_outputs={"image": encoded},
        logits_to_keep=1,
    )
    logits: Tensor = output.logits
    return logits


def candidates(
    model: Any, eager: Any, inputs: dict[str, Tensor], keep: int, first_layer: int
) -> dict[str, Callable[[], Tensor]]:
    """The three ways; the oracle's places are those the method chose once before."""
    with tokensieve.attach(model, "vtc-cls", keep=keep, first_layer=first_layer) as sieve:
        model(**inputs, logits_to_keep=1)
        kept = torch.stack([row[0].kept for row in sieve.last])

    def method() -> Tensor:
        logits: Tensor = model(**inputs, logits_to_keep=1).logits
        return logits

    def oracle() -> Tensor:
        features = torch.stack(list(model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output))
        return short_forward(model, inputs, features.take_along_dim(kept[..., None], 1), kept)

    def authors() -> Tensor:
        tower = eager(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
        rows = [attention[:, :, 0, 1:].mean(1) for attention in tower.attentions[first_layer:-1]]
        chosen = torch.stack(rows).sum(0).topk(keep).indices.sort(-1).values
        features = tower.hidden_states[-2][:, 1:].take_along_dim(chosen[..., None], 1)
        return short_forward(model, inputs, model.model.multi_modal_projector(features), chosen)

    return {"method": method, "oracle": oracle, "eager": authors}


def eager_tower(model: Any) -> Any:
    """The model's tower again, on the same weights, with eager attention."""
    tower = type(model.model.vision_tower)._from_config(
        model.config.vision_config, attn_implementation="eager", dtype=model.dtype
    )
    tower.load_state_dict(model.model.vision_tower.state_dict())
    return tower.to(model.device).eval()


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    model = build(args.llm, dtype, device)
    eager = eager_tower(model)
    results = []
    for batch in args.batch:
        inputs = prompt(batch, model)
        ways = candidates(model, eager, inputs, args.keep, args.first_layer)
        spec = f"vtc-cls(keep={args.keep}, first_layer={args.first_layer})"
        around = [partial(tokensieve.attach, model, spec), nullcontext, nullcontext]
        with tokensieve.attach(model, spec):
            mine = ways["method"]()
        difference = (mine - ways["oracle"]()).abs().max().item() / mine.std().item()
        times = interleave(list(ways.values()), around=around, repeats=args.repeats, warmup=1, device=device)
        by_way = dict(zip(ways, times, strict=True))
        row = {
            "batch": batch,
            "method_over_oracle": vars(paired_ratio(by_way["method"], by_way["oracle"])),
            "eager_over_method": vars(paired_ratio(by_way["eager"], by_way["method"])),
            "milliseconds": by_way,
            "logit_difference_over_std": difference,
        }
        print({k: v for k, v in row.items() if k != "milliseconds"}, flush=True)
        results.append(row)
    settings = {**vars(args), "output": None, "tokens": 576, "device": device}
    return {"settings": settings, "environment": environment(model), "results": results}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--llm", choices=["tiny", *LLM], default="mid")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--first-layer", type=int, default=0, help="first layer of the ensemble; 0 probes 23 layers")
    parser.add_argument("--repeats", type=int, default=7)
    run_script(parser, run)


if __name__ == "__main__":
    main()
