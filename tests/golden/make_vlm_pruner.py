"""Make the vectors of VLM-Pruner: ``python -m tests.golden.make_vlm_pruner CHECKOUT``.

CHECKOUT is a clone of github.com/Casey-bit/VLMPruner at 556a9142c67dfb4c27420e31bb59e2efe502369a. Its choice for
LLaVA-1.5 runs alone, on drawn hidden states and keys of 24×24 tokens.
"""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.golden.drawn import bells, clustered
from tests.golden.storing import commit, functions, store

START, TOKENS, TEXT = 35, 576, 12
CASES = {
    "reduce_889": {"seed": 7000, "ratio": 0.889, "width": 320, "clusters": 30, "scale": 1.0},
    "reduce_778": {"seed": 7010, "ratio": 0.778, "width": 288, "clusters": 12, "scale": 1.0},
    "reduce_667": {"seed": 7020, "ratio": 0.667, "width": 256, "clusters": 9, "scale": 0.5, "short": True},
    "alike": {"seed": 7030, "ratio": 0.889, "width": 256, "clusters": 5, "scale": 0.1, "short": True},
    "no_cluster": {"seed": 7040, "ratio": 0.889, "width": 256, "clusters": 0, "scale": 1.0},
    "batch_5": {
        "seed": 7050,
        "ratio": 0.778,
        "width": 256,
        "clusters": 40,
        "scale": 0.4,
        "batch": 5,
        "pivots": 9,
        "short": True,
    },
}


def states_of(h: dict) -> Tensor:
    """Draw the hidden states of the image, `[1, 576, D]`; a small scale makes tokens of a cluster more alike."""
    rows = clustered(h["seed"], TOKENS, h["width"], h["clusters"])
    noise = bells(h["seed"], TOKENS, h["width"])
    return (rows - (1 - h["scale"]) * noise)[None]


def keys_of(h: dict) -> Tensor:
    """Draw the keys of the image, `[1, 576, E]`."""
    return bells(h["seed"] + 5, 1, TOKENS, 64)


def cases(file: Path):
    official = functions(file, "calculate_similarity", "get_spatial_pos", "get_retained_image_token", math=math)
    for name, h in CASES.items():
        settings = {"image_token_start_index": START, "image_token_length": TOKENS, "reduction_ratio": h["ratio"]}
        settings |= {"pivot_image_token": h.get("pivots", 4), "threshold": 0.8, "token_batch": h.get("batch", 16)}
        model = SimpleNamespace(get_spatial_pos=lambda places: official.get_spatial_pos(None, places))
        model.calculate_similarity = lambda *args, model=model: official.calculate_similarity(model, *args)
        states = torch.nn.functional.pad(states_of(h), (0, 0, START, TEXT))
        keys = torch.nn.functional.pad(keys_of(h), (0, 0, START, TEXT)).view(1, -1, 4, 16).transpose(1, 2)
        config = SimpleNamespace(VLMPruner_config=settings)
        kept, states = official.get_retained_image_token(model, config, states, keys)
        rows = states[0, kept]
        numbers = torch.stack([rows.sum(-1), rows @ bells(h["seed"] + 6, h["width"])], -1)  # two numbers for each row
        yield name, h, {"kept": (kept - START).short(), "numbers": numbers}


def main(checkout: Path) -> None:
    torch.set_num_threads(1)
    entry = {
        "method": "vlm_pruner",
        "paper": "arXiv:2512.02700",
        "title": "VLM-Pruner: Buffering for Spatial Sparsity in an Efficient VLM Centrifugal Token Pruning Paradigm",
        "repo": "Casey-bit/VLMPruner",
        "commit": commit(checkout),
        "source": ["llava/model/language_model/modeling_llama_self.py: VLMPruner.get_retained_image_token"],
        "deviations": [],
        "law": "hidden states: make_vlm_pruner.states_of; keys: make_vlm_pruner.keys_of, of four heads",
    }
    store("vlm_pruner", [entry], {"vlm_pruner": list(cases(checkout / entry["source"][0].partition(":")[0]))})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
