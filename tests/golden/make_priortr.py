"""Make the vectors of PriorTR and CLSE: ``python -m tests.golden.make_priortr CHECKOUT``.

CHECKOUT is a clone of github.com/CodeChildCZJ/PriorTR at e442a4c14af1b333067a6b8310c9111cad922033. Its strategies for
LLaVA-1.5 score and select; they are run alone, on drawn attention and hidden states and on those of a small LLaVA.
"""

import importlib
import sys
import types
from pathlib import Path

import torch

from tests.golden.drawn import attention_rows, bells, fill, positive
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


def states_of(h: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw hidden states of the image at the LLM's input and in a later layer, `[1, N, 64]`; some do not change."""
    first = bells(h["seed"] + 1, 1, h["tokens"], 64)
    change = bells(h["seed"] + 2, 1, h["tokens"], 64) * positive(h["seed"] + 3, 1, h["tokens"], 1)
    change[:, ::7] = 0
    return first, first + change


@torch.no_grad()
def clse_cases(clse):
    for number, (keep, stage) in enumerate([(192, 0), (128, 0), (64, 0), (64, 1), (192, 2)]):
        h = {"seed": 2200 + 10 * number, "heads": 4, "tokens": TOKENS, "keep": keep, "stage": stage}
        config, strategy = official({"keep_tokens": keep}), clse.CLSEStrategy()
        config.prune_layers = [1, 11, 21]
        first, now = states_of(h)
        columns = torch.zeros(1, START + TOKENS + TEXT, 64)
        columns[:, START : START + TOKENS] = now
        context = {"layer_idx": (0, 10, 20)[stage], "z_ref": first, "hidden_states": columns}
        scores = strategy.compute_scores(whole(rows_of(h)), (START, START + TOKENS), config, **context)
        kept = strategy.select_tokens(scores, TOKENS, config)
        yield f"{keep}_stage_{stage}", h | {"count": len(kept)}, {"scores": scores, "kept": kept.short()}


@torch.no_grad()
def clse_grid_cases(clse):
    for number, grid in enumerate([(24, 24), (12, 48), (23, 25), (2, 9)]):
        h = {"seed": 2300 + 10 * number, "grid": grid, "tokens": grid[0] * grid[1]}
        attention = attention_rows(h["seed"], 1, 1, h["tokens"])[:, 0]
        scores = clse._calculate_evolution_score(*states_of(h), attention, grid, 0.1, "clse_attn")
        yield f"{grid[0]}x{grid[1]}", h, {"scores": scores[0]}


@torch.no_grad()
def clse_model_cases(clse):
    h = {"seed": 2400, "sharp": 0.5, "keep": 64}
    model, inputs = small_llava(h)
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    config, strategy = official({"keep_tokens": h["keep"]}), clse.CLSEStrategy()
    config.prune_layers = [1, 11, 21]
    first, now = out.hidden_states[:2]
    context = {"layer_idx": 0, "z_ref": first[:, 1 : 1 + TOKENS], "hidden_states": now}
    scores = strategy.compute_scores(out.attentions[0], (1, 1 + TOKENS), config, **context)
    kept = strategy.select_tokens(scores, TOKENS, config)
    yield "first_stage", h | {"count": len(kept)}, {"scores": scores, "kept": kept.short()}


def main(checkout: Path) -> None:
    package("vtr", checkout / "image/LLaVA/llava/vtr")
    clse = importlib.import_module("vtr.strategy.clse")
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
    common = {
        **repository,
        "paper": "arXiv:2606.24165",
        "title": "Spectral Evolution-Guided Token Pruning in Multimodal Large Language Models",
        "source": [f"{folder}/clse.py: CLSEStrategy, _calculate_evolution_score"],
    }
    entries += [
        {"method": "clse", **common, "deviations": [drawn, "hidden states: make_priortr.states_of"]},
        {"method": "clse_grid", **common, "deviations": ["scores alone, on other grids"]},
        {"method": "clse_model", **common, "deviations": [small, "the first of three layers"]},
    ]
    cases = {
        "priortr": priortr_cases(priortr),
        "priortr_model": priortr_model_cases(priortr),
        "clse": clse_cases(clse),
        "clse_grid": clse_grid_cases(clse),
        "clse_model": clse_model_cases(clse),
    }
    store("priortr", entries, {method: list(of_method) for method, of_method in cases.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
