"""Write ``ranking.safetensors`` and its manifest: ``python -m tests.golden.make_ranking FOLDER``.

FOLDER holds the authors' repositories, checked out as ``OWNER+NAME``, at the commits that the entries below name. Their
functions run alone, on inputs that ``drawn.py`` draws from the seed of each case; only outputs are stored.
"""

import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.golden.drawn import clustered, received
from tests.golden.official import functions, write

ENTRIES: list[dict[str, Any]] = [
    {
        "method": "hiprune",
        "paper": "arXiv:2508.00553",
        "title": "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
        "repo": "Danielement321/HiPrune",
        "commit": "6e83a1240874e99a25df34f54221a29bb24b7bc2",
        "source": ["LLaVA/llava/model/llava_arch.py: LlavaMetaForCausalLM.encode_images"],
        "deviations": ["the vision tower returns drawn attention, all of it that of one query; identity projector"],
        "law": "attention received in layer 8 is received(seed, batch, levels), in layer 22 of 24 that of seed + 1",
        "cases": [
            {"case": "keep_192", "hyperparameters": {"seed": 1, "batch": 1, "keep": 192, "alpha": 0.1}},
            {"case": "keep_128", "hyperparameters": {"seed": 3, "batch": 1, "keep": 128, "alpha": 0.1}},
            {"case": "keep_64", "hyperparameters": {"seed": 5, "batch": 1, "keep": 64, "alpha": 0.1}},
            {"case": "many_anchors", "hyperparameters": {"seed": 7, "batch": 3, "keep": 192, "alpha": 0.6}},
            {"case": "ties", "hyperparameters": {"seed": 9, "batch": 1, "keep": 128, "alpha": 0.3, "levels": 40}},
        ],
    },
    {
        "method": "otprune",
        "paper": "arXiv:2602.20205",
        "title": "OTPrune: Distribution-Aligned Visual Token Pruning via Optimal Transport",
        "repo": "xiwenc1/OTPrune",
        "commit": "3414730f39daa57e0629138d898f98ee682f0b2b",
        "source": ["LLaVA/llava/model/llava_arch.py: OTPrune, greedy_select"],
        "deviations": [],
        "law": "projected tokens are clustered(seed, tokens, width, clusters); kept is ascending",
        "cases": [
            {
                "case": "keep_64",
                "hyperparameters": {"seed": 21, "tokens": 576, "keep": 64, "width": 64, "clusters": 12},
            },
            {
                "case": "keep_56",
                "hyperparameters": {"seed": 23, "tokens": 576, "keep": 56, "width": 256, "clusters": 40},
            },
            {
                "case": "keep_192",
                "hyperparameters": {"seed": 25, "tokens": 576, "keep": 192, "width": 96, "clusters": 5},
            },
            {
                "case": "no_cluster",
                "hyperparameters": {"seed": 27, "tokens": 729, "keep": 73, "width": 64, "clusters": 0},
            },
        ],
    },
    {
        "method": "apet",
        "paper": "arXiv:2602.19870",
        "title": "ApET: Approximation-Error Guided Token Compression for Efficient VLMs",
        "repo": "Maqkccx/ApET",
        "commit": "70cc01b215f4d74c5661c699919fe3aeda48bed0",
        "source": ["llava/model/llava_arch.py: encode_images, token_merging", "llava/model/utils.py: fps"],
        "deviations": ["the first basis row is the longest, not drawn; float32 for float16; identity projector"],
        "law": "the vision tower returns clustered(seed, 576, width, clusters); places is ascending",
        "cases": [
            {"case": "keep_96", "hyperparameters": {"seed": 31, "keep": 96, "basis": 10, "width": 64, "clusters": 12}},
            {"case": "keep_64", "hyperparameters": {"seed": 34, "keep": 64, "basis": 10, "width": 128, "clusters": 30}},
            {"case": "basis_30", "hyperparameters": {"seed": 37, "keep": 40, "basis": 30, "width": 64, "clusters": 5}},
        ],
    },
    {
        "method": "apet_llm",
        "paper": "arXiv:2602.19870",
        "title": "ApET: Approximation-Error Guided Token Compression for Efficient VLMs",
        "repo": "Maqkccx/ApET",
        "commit": "70cc01b215f4d74c5661c699919fe3aeda48bed0",
        "source": ["llava/model/modeling_llama_x.py: layer_prune, token_merging", "llava/model/utils.py: fps"],
        "deviations": ["the first basis row is the longest, not drawn; float32 in place of float16"],
        "law": "the hidden states of the image are clustered(seed, tokens, width, clusters)",
        "cases": [
            {
                "case": "96_to_32",
                "hyperparameters": {"seed": 41, "tokens": 96, "keep": 32, "basis": 10, "width": 64, "clusters": 6},
            },
            {
                "case": "576_to_64",
                "hyperparameters": {"seed": 44, "tokens": 576, "keep": 64, "basis": 10, "width": 96, "clusters": 20},
            },
        ],
    },
    {
        "method": "vscan",
        "paper": "arXiv:2505.22654",
        "title": "VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models",
        "repo": "Tencent/SelfEvolvingAgent",
        "commit": "a82450e1b5e15070bee79ee8b79f8d9a97cb85f7",
        "source": ["VScan/llava/model/llava_arch.py: encode_images, window_cls_selection, token_merging"],
        "deviations": ["the vision tower returns drawn attention and rows; identity projector"],
        "law": "attention of [CLS] in layer 5 is received(seed, batch) / 576, in layer 22 of 24 that of seed + 1; "
        "rows of image i are clustered(seed + 2 + 3 * i, 576, width, clusters)",
        "cases": [
            {"case": "keep_96", "hyperparameters": {"seed": 51, "batch": 1, "keep": 96, "width": 64, "clusters": 12}},
            {"case": "keep_64", "hyperparameters": {"seed": 61, "batch": 1, "keep": 64, "width": 128, "clusters": 0}},
            {"case": "batch_3", "hyperparameters": {"seed": 71, "batch": 3, "keep": 160, "width": 64, "clusters": 30}},
        ],
    },
]


def hiprune(folder: Path, h: dict[str, Any]) -> dict[str, Tensor]:
    file = folder / "Danielement321+HiPrune/LLaVA/llava/model/llava_arch.py"
    encode = functions(file, "encode_images", os=os)["encode_images"]
    os.environ |= {"HIPRUNE_RETENTION": str(h["keep"] * h["batch"]), "HIPRUNE_ALPHA": str(h["alpha"])}
    os.environ["HIPRUNE_OBJECT_LAYER"] = "9"
    attention = [torch.zeros(h["batch"], 1, 577, 577) for _ in range(24)]
    for layer, seed in ((8, h["seed"]), (22, h["seed"] + 1)):  # all of the attention is that of one query
        attention[layer][:, 0, 0, 1:] = 577 * received(seed, h["batch"], h.get("levels", 0))
    tower = SimpleNamespace(
        get_vision_tower=lambda: lambda images: (torch.zeros(h["batch"], 576, 1), attention),
        mm_projector=lambda rows: rows,
    )
    model = SimpleNamespace(get_model=lambda: tower, config=SimpleNamespace(mm_vision_select_layer=-2))
    _, kept = encode(model, None)
    return {"kept": kept}


def otprune(folder: Path, h: dict[str, Any]) -> dict[str, Tensor]:
    file = folder / "xiwenc1+OTPrune/LLaVA/llava/model/llava_arch.py"
    official = functions(file, "greedy_select", "OTPrune")
    rows = clustered(h["seed"], h["tokens"], h["width"], h["clusters"])
    kept, _ = official["OTPrune"](None, rows, h["tokens"], None, threshold_ratio=h["keep"] / h["tokens"])
    return {"kept": kept.sort().values.short()}


def vscan(folder: Path, h: dict[str, Any]) -> dict[str, Tensor]:
    file, batch = folder / "Tencent+SelfEvolvingAgent/VScan/llava/model/llava_arch.py", h["batch"]
    official = functions(file, "encode_images", "window_cls_selection", "token_merging")
    rows = torch.stack([clustered(h["seed"] + 2 + 3 * i, 576, h["width"], h["clusters"]) for i in range(batch)])
    attention = torch.zeros(24, batch, 1, 576)
    attention[5, :, 0], attention[22, :, 0] = received(h["seed"], batch) / 576, received(h["seed"] + 1, batch) / 576
    tower = SimpleNamespace(get_vision_tower=lambda: lambda images: (rows, attention), mm_projector=lambda rows: rows)
    official_self = SimpleNamespace(get_model=lambda: tower, get_visual_token_num=lambda: h["keep"])
    for name in ("window_cls_selection", "token_merging"):
        setattr(official_self, name, partial(official[name], official_self))
    merged, kept, _ = official["encode_images"](official_self, None)
    return {"kept": kept, "rows": merged[kept].view(batch, h["keep"], -1)}


def longest(rows: Tensor) -> Any:
    """Return ``torch`` with a ``randint`` that returns the longest of the rows `[N, D]`."""
    return SimpleNamespace(**vars(torch) | {"randint": lambda *_, **__: rows.norm(dim=-1).argmax()[None]})


def apet(folder: Path, h: dict[str, Any]) -> dict[str, Tensor]:
    model, rows = folder / "Maqkccx+ApET/llava/model", clustered(h["seed"], 576, h["width"], h["clusters"])
    fps = functions(model / "utils.py", "fps", torch=longest(rows))["fps"]
    official = functions(model / "llava_arch.py", "encode_images", "token_merging", fps=fps)
    tower = SimpleNamespace(
        get_vision_tower=lambda: lambda images: (torch.nn.functional.pad(rows, (0, 0, 1, 0))[None], None),
        mm_projector=lambda rows: rows,
    )
    official_self = SimpleNamespace(
        get_model=lambda: tower,
        model=SimpleNamespace(basis_token_num=h["basis"]),
        get_visual_token_num=lambda: h["keep"],
    )
    official_self.token_merging = lambda *args: official["token_merging"](official_self, *args)
    merged, kept = official["encode_images"](official_self, None)
    return {"places": kept[0].nonzero().flatten().short(), "rows": merged[0][kept[0]]}


def apet_llm(folder: Path, h: dict[str, Any]) -> dict[str, Tensor]:
    model, rows = folder / "Maqkccx+ApET/llava/model", clustered(h["seed"], h["tokens"], h["width"], h["clusters"])
    fps = functions(model / "utils.py", "fps", torch=longest(rows))["fps"]
    merge = functions(model / "modeling_llama_x.py", "token_merging")["token_merging"]
    prune = functions(model / "modeling_llama_x.py", "layer_prune", token_merging=merge, fps=fps, IGNORE_INDEX=-100)
    official_self = SimpleNamespace(
        config=SimpleNamespace(),
        basis_token_num=h["basis"],
        image_token_list=[h["tokens"], h["keep"]],
        image_tokens=[h["tokens"]],
        image_token_posi=[35],
    )
    features = torch.nn.functional.pad(rows, (0, 0, 35, 12))[None]
    arguments = {"position_ids": None, "attention_mask": None, "labels": None, "selected_indices": None}
    arguments |= {"sum_visual_attention": None, "indices_attention": None}
    _, _, states, _ = prune["layer_prune"](official_self, 0, 16, features, **arguments)
    return {"rows": states[0, 35:-12]}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.Tensor.cuda = torch.Tensor.half = lambda rows: rows  # type: ignore[method-assign, assignment]
    tensors = {
        f"{entry['method']}/{case['case']}/{name}": rows
        for entry in ENTRIES
        for case in entry["cases"]
        for name, rows in globals()[entry["method"]](folder, case["hyperparameters"]).items()
    }
    write("ranking", ENTRIES, tensors, __doc__.split("\n\n")[1].replace("\n", " "))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
