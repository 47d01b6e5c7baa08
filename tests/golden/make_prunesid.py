"""Make the vectors of PruneSID: ``python -m tests.golden.make_prunesid CHECKOUT``.

CHECKOUT is a clone of github.com/ZhengyaoFang/PruneSID at 4ef17d96b390027f31243bc7e1d27bdee77792a5. Its forward of the
vision tower runs on drawn rows and attention. The components are exact, and no place is set aside for [CLS].
"""

import ast
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.golden.drawn import clustered, received
from tests.golden.storing import commit, store

CASES = {
    "keep_192": {"seed": 6000, "batch": 1, "keep": 192, "width": 96, "clusters": 12},
    "keep_128": {"seed": 6010, "batch": 1, "keep": 128, "width": 64, "clusters": 30},
    "keep_64": {"seed": 6020, "batch": 1, "keep": 64, "width": 64, "clusters": 9},
    "no_cluster": {"seed": 6030, "batch": 1, "keep": 64, "width": 96, "clusters": 0},
    "batch_3": {"seed": 6040, "batch": 3, "keep": 100, "width": 64, "clusters": 16},
    "keep_9": {"seed": 6050, "batch": 1, "keep": 9, "width": 64, "clusters": 5},
    "most": {"seed": 6060, "batch": 2, "keep": 450, "width": 128, "clusters": 40},
    "ties": {"seed": 6070, "batch": 1, "keep": 80, "width": 64, "clusters": 12, "levels": 60},
}
RESERVED = "group_lower_bound.sum(-1) - 1"  # one of the K tokens is [CLS]


def rows_of(h: dict) -> Tensor:
    """Draw the encoder's rows, `[B, 576, C]`."""
    return torch.stack([clustered(h["seed"] + 3 * i, 576, h["width"], h["clusters"]) for i in range(h["batch"])]) / 3


def attention_of(h: dict) -> Tensor:
    """Draw the attention of [CLS], `[B, 576]`, positive."""
    rows = received(h["seed"] + 100, h["batch"], h.get("levels", 0)) + 2.0**-10
    return rows / 600


def exact(rows: Tensor, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what ``torch.pca_lowrank`` approximates."""
    left, values, right = torch.linalg.svd((rows - rows.mean(-2, keepdim=True)).double(), full_matrices=False)
    return left[..., :q], values[..., :q], right.mT[..., :q].float()


def official_class(file: Path) -> type:
    """Return the authors' vision tower, without a place for [CLS]."""
    text = file.read_text("utf-8")
    assert text.count(RESERVED) == 1
    tree = ast.parse(text.replace(RESERVED, RESERVED.removesuffix(" - 1")))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names = SimpleNamespace(**vars(torch) | {"pca_lowrank": exact, "argsort": partial(torch.argsort, stable=True)})
    scope = {"torch": names, "nn": torch.nn, "F": torch.nn.functional, "math": math}
    exec(compile(tree, str(file), "exec"), scope)
    return scope["CLIPVisionTower_PruneSID"]


def cases(official: type):
    for name, h in CASES.items():
        rows, attention = rows_of(h), torch.zeros(h["batch"], 1, 577, 577)
        attention[:, 0, 0, 1:] = attention_of(h)
        out = SimpleNamespace(
            attentions=[attention, attention], hidden_states=[torch.nn.functional.pad(rows, (0, 0, 1, 0))] * 2
        )
        tower = SimpleNamespace(
            vision_tower=lambda *_, out=out, **__: out, device="cpu", dtype=torch.float32, need_token_num=h["keep"]
        )
        _, kept = official.forward(tower, torch.zeros(h["batch"], 3, 2, 2))
        yield name, h, {"kept": (kept[:, 1:] - 1).sort(-1).values.short()}


def main(checkout: Path) -> None:
    torch.set_num_threads(1)
    entry = {
        "method": "prunesid",
        "paper": "arXiv:2603.09480",
        "title": "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic "
        "Importance-Diversity",
        "repo": "ZhengyaoFang/PruneSID",
        "commit": commit(checkout),
        "source": ["prunesid/prunesid_llava/clip_encoder.py: CLIPVisionTower_PruneSID.forward"],
        "deviations": [
            "exact principal components in the place of torch.pca_lowrank, which draws a sketch",
            "of equals, sorts put the first first",
            "a patch takes the place of [CLS] among the K tokens",
        ],
        "law": "rows: make_prunesid.rows_of; attention of [CLS]: make_prunesid.attention_of",
    }
    official = official_class(checkout / "prunesid/prunesid_llava/clip_encoder.py")
    store("prunesid", [entry], {"prunesid": list(cases(official))})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
