"""Make the vectors of PriorTR and CLSE: ``python -m tests.golden.make_priortr CHECKOUT``.

CHECKOUT is a clone of github.com/CodeChildCZJ/PriorTR at e442a4c14af1b333067a6b8310c9111cad922033. Its strategies for
LLaVA-1.5 score and select; they are run alone, on drawn attention and hidden states and on those of a small LLaVA.
"""

import importlib
import sys
import types
from pathlib import Path

import torch

from tests.golden.drawn import attention_rows, bells, fill
from tests.golden.small_llava import llava_around
from tests.golden.storing import commit, package, store
from tests.support.families import BOS, IMAGE

START, TOKENS, TEXT = 5, 576, 20  # columns before the image, of the image, and after it
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def whole(rows: torch.Tensor) -> torch.Tensor:
    """Put rows of the tokens after the image `[1, H, TEXT, L]` where they stand in the attention `[1, H, L, L]`."""
    length = rows.shape[-1]
    attention = torch.zeros(1, rows.shape[1], length, length)
    attention[:, :, -rows.shape[2] :] = rows
    return attention


def rows_of(h: dict) -> torch.Tensor:
    """Draw the attention of the tokens after the image, `[1, H, TEXT, L]`."""
    length = START + TOKENS + TEXT
    rows = attention_rows(h["seed"], TEXT, h["heads"], length, h.get("levels", 0)).transpose(0, 1)[None]
    return rows / rows.sum(-1, keepdim=True)


def small_llava(h: dict):
    """Return a small LLaVA with 576 visual tokens, and its inputs."""
    model = llava_around({**SMALL, "image_size": 48, "patch_size": 2}, layers=4)
    fill(model.model.vision_tower, h["seed"], h["sharp"])
    fill(model.model.language_model, h["seed"] + 2, h["sharp"])
    ids = torch.tensor([[BOS, *[IMAGE] * TOKENS, *range(7, 19)]])
    return model, {"input_ids": ids, "pixel_values": bells(h["seed"] + 1, 1, 3, 48, 48)}


def official(config) -> types.SimpleNamespace:
    """Return the settings that the authors' strategies read."""
    defaults = {"head_aggregation": "mean", "prune_layers": [config.pop("layer", 3)]}
    return types.SimpleNamespace(**defaults | config)


@torch.no_grad()
def priortr_cases(strategy):
    for number, (query, keep, heads, levels) in enumerate(
        [("question", 192, 4, 0), ("question", 128, 4, 0), ("question", 64, 32, 0), ("last", 320, 4, 0),
         ("last", 64, 4, 0), ("question", 64, 4, 3)]
    ):  # fmt: skip
        h = {"seed": 2000 + number, "heads": heads, "levels": levels, "query": query, "keep": keep}
        config = official({"query_aggregation": query, "keep_tokens": keep})
        scores = strategy.compute_scores(whole(rows_of(h)), (START, START + TOKENS), config)
        kept = strategy.select_tokens(scores, TOKENS, config)
        yield f"{query}_{keep}" + "_levels" * bool(levels), h, {"scores": scores, "kept": kept.short()}


@torch.no_grad()
def priortr_model_cases(strategy):
    for query, layer in (("question", 3), ("last", 2)):
        h = {"seed": 2100, "sharp": 0.5, "query": query, "layer": layer, "keep": 64}
        model, inputs = small_llava(h)
        model.set_attn_implementation("eager")
        attention = model(**inputs, output_attentions=True).attentions[layer - 1]
        config = official({"query_aggregation": query, "keep_tokens": h["keep"]})
        scores = strategy.compute_scores(attention, (1, 1 + TOKENS), config)
        yield query, h, {"scores": scores, "kept": strategy.select_tokens(scores, TOKENS, config).short()}


def main(checkout: Path) -> None:
    package("vtr", checkout / "image/LLaVA/llava/vtr")
    priortr = importlib.import_module("vtr.strategy.priortr").PriorTRStrategy()
    repository = {"repo": "CodeChildCZJ/PriorTR", "commit": commit(checkout)}
    folder = "image/LLaVA/llava/vtr/strategy"
    common = {
        **repository,
        "paper": "arXiv:2606.24156",
        "title": "PriorTR: Accelerating Multimodal Large Language Models with Prior-Corrected Token Reduction",
        "source": [f"{folder}/priortr.py: PriorTRStrategy.compute_scores", f"{folder}/base.py: select_tokens"],
    }
    drawn = "attention rows of the 20 tokens after the image: make_priortr.rows_of; all other rows are zero"
    small = "the small LLaVA of make_priortr.small_llava; eager attention of the layer before `layer`"
    entries = [
        {"method": "priortr", **common, "deviations": [drawn]},
        {"method": "priortr_model", **common, "deviations": [small]},
    ]
    store(
        "priortr",
        entries,
        {"priortr": list(priortr_cases(priortr)), "priortr_model": list(priortr_model_cases(priortr))},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
