"""Write ``idpruner.safetensors`` and its manifest: ``python -m tests.golden.make_idpruner FOLDER``.

FOLDER holds the authors' repositories, checked out as ``OWNER+NAME``, at the commits that the entry below names. Their
functions run alone, on inputs that are drawn from the seed of each case; only outputs are stored.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Union

import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.golden.drawn import bells, clustered, drawn, received, rows_with_copies
from tests.golden.official import functions, write

WIDTH, HIDDEN = 64, 32
ENTRIES: list[dict[str, Any]] = [
    {
        "method": "idpruner",
        "paper": "arXiv:2602.13315",
        "title": "IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs",
        "repo": "Tencent/AngelSlim",
        "commit": "67394ce55f6b6cfae702575fbc3c7a05c13fdd74",
        "source": [
            "angelslim/compressor/token_compressor/algorithm/idpruner.py: idpruner and its defaults",
            "angelslim/compressor/token_compressor/algorithm/utils/utils.py: resolve_num_tokens_to_keep",
            "JulietChoo/VisionSelector at 800a70f6, qwen-evaluation/token_compression/selector_scorer.py: forward",
        ],
        "deviations": ["the scores are drawn, or those of the scorer, which no checkpoint folder gives"],
        "law": "rows_of and scores_of of make_idpruner.py draw rows and scores; kept is the mask of 576 tokens",
        "cases": [
            {"case": "keep_144", "hyperparameters": {"seed": 1, "ratio": 0.75, "clusters": 12}},
            {"case": "keep_58", "hyperparameters": {"seed": 11, "ratio": 0.9, "clusters": 30}},
            {"case": "keep_29", "hyperparameters": {"seed": 21, "ratio": 0.95, "clusters": 5}},
            {"case": "more_important", "hyperparameters": {"seed": 31, "ratio": 0.9, "balance": 0.8, "clusters": 12}},
            {"case": "all_diversity", "hyperparameters": {"seed": 41, "ratio": 0.9, "balance": 0.0, "clusters": 12}},
            {"case": "ties", "hyperparameters": {"seed": 51, "ratio": 0.9, "clusters": 12, "levels": 8}},
            {"case": "copies", "hyperparameters": {"seed": 61, "ratio": 0.75, "copies": 200}},
            {"case": "scorer", "hyperparameters": {"seed": 71, "ratio": 0.9, "clusters": 12, "scorer": True}},
        ],
    }
]


def rows_of(h: dict[str, Any]) -> Tensor:
    if "copies" in h:
        return rows_with_copies(h["seed"], 576, WIDTH, h["copies"])
    return clustered(h["seed"], 576, WIDTH, h["clusters"])


def scores_of(h: dict[str, Any]) -> Tensor:
    return received(h["seed"] + 3, 1, h.get("levels", 0))


def scorer_of(h: dict[str, Any]) -> dict[str, Tensor]:
    """Return the parameters of a scorer, under the authors' names."""
    parts = enumerate(("q_proj", "k_proj"), h["seed"] + 4)
    return {
        name: rows
        for seed, part in parts
        for name, rows in (
            (f"{part}.weight", bells(seed, HIDDEN, WIDTH) / WIDTH),
            (f"{part}.bias", drawn(seed + 5, HIDDEN)),
        )
    }


def official_scores(file: Path, h: dict[str, Any], rows: Tensor) -> Tensor:
    weights = scorer_of(h)
    project = {
        part: lambda x, part=part: linear(x, weights[f"{part}.weight"], weights[f"{part}.bias"])
        for part in ("q_proj", "k_proj")
    }
    return functions(file, "forward")["forward"](SimpleNamespace(hidden_dim=HIDDEN, **project), rows)


def main(folder: Path) -> None:
    algorithm = folder / "Tencent+AngelSlim/angelslim/compressor/token_compressor/algorithm"
    scorer = folder / "JulietChoo+VisionSelector/qwen-evaluation/token_compression/selector_scorer.py"
    count = functions(algorithm / "utils/utils.py", "resolve_num_tokens_to_keep", math=math)
    tensors = {}
    for case in ENTRIES[0]["cases"]:
        h = case["hyperparameters"]
        rows = rows_of(h)

        def scores(h=h, **given: Any) -> Tensor:
            return official_scores(scorer, h, given["vision_hidden"]) if "scorer" in h else scores_of(h)

        known = {
            **count,
            "Callable": Callable,
            "Union": Union,
            "PruningContext": object,
            "get_universal_selector_scores": scores,
            "_extract_and_validate_vision_token_info": lambda _: (torch.arange(576), torch.arange(0), None, None),
        }
        names = ("_default_similarity_compute", "_default_importance_compute", "_resolve_callable", "idpruner")
        official = functions(algorithm / "idpruner.py", *names, **known)["idpruner"]
        context = SimpleNamespace(input_ids=torch.zeros(1, 576, dtype=torch.int64), inputs_embeds=rows[None])
        mask = official(context, ratio=h["ratio"], selector_path="", mmr_lambda=h.get("balance", 0.5))
        tensors[f"idpruner/{case['case']}/kept"] = mask
    write("idpruner", ENTRIES, tensors, "drawn by tests/golden/drawn.py from the seed; none are stored")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
