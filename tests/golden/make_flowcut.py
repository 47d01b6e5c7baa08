"""Make the vectors of FlowCut: ``python -m tests.golden.make_flowcut CHECKOUT``.

CHECKOUT is a clone of github.com/TungChintao/FlowCut at a2ecd247cb3c605773ec317a0c246425b47abdbe. Its forwards of the
CLIP encoder run in a small encoder of 576 patches, in the place of the encoder's own.
"""

import sys
from pathlib import Path
from types import MethodType
from typing import Optional, Union

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from tests.golden.drawn import bells, fill
from tests.golden.small_llava import llava_around
from tests.golden.storing import commit, functions, store

CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 48, "patch_size": 2}
CASES = {
    "keep_192": {"seed": 5000, "layers": 24, "sharp": 0.5, "keep": 192},
    "keep_128": {"seed": 5010, "layers": 24, "sharp": 0.7, "keep": 128},
    "keep_64": {"seed": 5020, "layers": 24, "sharp": 0.8, "keep": 64},
    "odd_depth": {"seed": 5030, "layers": 9, "sharp": 0.8, "keep": 64},
    "early": {"seed": 5040, "layers": 12, "sharp": 1.0, "keep": 300},
    "two_layers": {"seed": 5050, "layers": 3, "sharp": 1.0, "keep": 32},
}


def small_llava(h: dict):
    """Return a small LLaVA with 576 visual tokens whose features are the output of the last encoder layer but one."""
    model = llava_around({**CLIP, "num_hidden_layers": h["layers"]})
    fill(model.model.vision_tower, h["seed"], h["sharp"])
    return model, bells(h["seed"] + 1, 1, 3, 48, 48)


@torch.no_grad()
def cases(folder: Path):
    helpers = functions(folder / "utils_flowcut.py", "compute_score", "adaptive_prune_ratio")
    names = ("CLIPAttention_forward", "CLIPEncoderLayer_forward", "CLIPEncoder_forward")
    needed = vars(helpers) | {"nn": torch.nn, "Optional": Optional, "Tuple": tuple, "Union": Union}
    official = functions(folder / "modeling_clip_flowcut.py", *names, **needed, BaseModelOutput=BaseModelOutput)
    for name, h in CASES.items():
        model, pixels = small_llava(h)
        tower = model.model.vision_tower
        encoder = tower.encoder
        encoder.target, encoder.select_layer = h["keep"] + 1, h["layers"] - 2
        encoder.forward = MethodType(official.CLIPEncoder_forward, encoder)
        for layer in encoder.layers:
            layer.forward = MethodType(official.CLIPEncoderLayer_forward, layer)
            layer.self_attn.forward = MethodType(official.CLIPAttention_forward, layer.self_attn)
            layer.self_attn._shape = MethodType(by_head, layer.self_attn)
        embedded = tower.pre_layrnorm(tower.embeddings(pixels))
        out, kept = encoder(embedded, output_attentions=True, output_hidden_states=True, return_dict=True)
        numbers = torch.tensor([rows.shape[1] - 1 for rows in out.hidden_states[1:]])
        yield name, h, {"kept": kept[0].short(), "rows": out.hidden_states[-2][0, 1:], "numbers": numbers.short()}


def by_head(self, rows: Tensor, length: int, batch: int) -> Tensor:
    """Split `[B, N, D]` by head, `[B, H, N, d]`, as the attention module did in the authors' release."""
    return rows.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2).contiguous()


def main(checkout: Path) -> None:
    torch.set_num_threads(1)
    entry = {
        "method": "flowcut",
        "paper": "arXiv:2505.19536",
        "title": "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
        "repo": "TungChintao/FlowCut",
        "commit": commit(checkout),
        "source": [
            "flowcut/modeling_clip_flowcut.py: CLIPAttention_forward, CLIPEncoderLayer_forward, CLIPEncoder_forward",
            "flowcut/utils_flowcut.py",
        ],
        "deviations": ["a small encoder: make_flowcut.small_llava"],
    }
    store("flowcut", [entry], {"flowcut": list(cases(checkout / "flowcut"))})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
