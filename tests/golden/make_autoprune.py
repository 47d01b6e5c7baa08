"""Make the vectors of AutoPrune: ``python -m tests.golden.make_autoprune CHECKOUT``.

CHECKOUT is a clone of github.com/AutoLab-SAI-SJTU/AutoPrune at e4a99184dd1d36d96dc379eb5ed18b5297f2c360. Its functions
for the information, the curve, the ranking and the merging are run alone, on drawn attention and hidden states.
"""

import math
import sys
import types
from pathlib import Path

import numpy as np
import torch

from tests.golden.drawn import attention_rows, bells
from tests.golden.storing import commit, functions, store

DEPTH, WORDS = 32, 40


def text_attention(h: dict) -> torch.Tensor:
    """Draw the attention of the words to the image, `[1, 32, WORDS, N]`; ``own`` is the share of each word's own."""
    shared = attention_rows(h["seed"], 1, 32, h["tokens"])[:, :, None]
    single = attention_rows(h["seed"] + 1, WORDS, 32, h["tokens"]).transpose(0, 1)[None]
    rows = (1 - h["own"]) * shared + h["own"] * single
    return h["mass"] * rows / rows.sum(-1, keepdim=True)


def states_of(h: dict) -> torch.Tensor:
    """Draw hidden states of the image, `[1, N, 64]`, around eight centres."""
    centre = torch.arange(h["tokens"]) * 5 % 8
    return (bells(h["seed"] + 2, 8, 64)[centre] + bells(h["seed"] + 3, h["tokens"], 64) / 4)[None]


def rearrange(rows: torch.Tensor, pattern: str) -> torch.Tensor:
    """Do what einops does for the two patterns of ``cluster_and_merge``, which only insert an axis."""
    return rows.unsqueeze({"b l r -> b l () r": 2, "b l r -> b () l r": 1}[pattern])


def curve_cases(code):
    for number, (tokens, target, own, mass) in enumerate(
        [(160, 64, 0.0, 0.3), (160, 64, 0.5, 0.3), (160, 64, 1.0, 0.9), (320, 128, 0.3, 0.3), (480, 192, 0.2, 0.5)]
    ):
        h = {"seed": 3000 + 10 * number, "tokens": tokens, "target": target, "own": own, "mass": mass}
        attention = text_attention(h)
        bits = sum(code.mutual_information(head) for head in attention[0])
        slope = code.calculate_dynamic_k(bits.item(), "linear", k0=0.4, gamma=0.2)
        places = list(range(1, DEPTH))
        shares = code.generate_keep_percent_abs(
            places, torch.tensor(tokens), "logistic", seq_len=DEPTH, token_num_sum=target, uniform=True,
            dynamic_k=slope, x0=14.9, ori_token_num=576,
        )  # fmt: skip
        counts, through, left = [], [], tokens
        for share in shares:  # as the forward does it: rank, then merge
            counts.append(min(math.ceil((tokens - 1) * share), left))
            pruned = left - counts[-1]
            left = counts[-1] + (0 if pruned == 0 else (int(pruned * 0.3) + 1) // 10 + 1)
            through.append(left)
        assert code.cal_sum_tokens_no_membership(shares, tokens, DEPTH, target, 576) == tokens + sum(through)
        outputs = {"bits": bits[None], "slope": torch.tensor([slope]), "counts": torch.tensor(counts).short()}
        yield f"{target}_of_{tokens}_own_{own:g}", h | {"through": sum(through), "last": through[-1]}, outputs


def layer_cases(code):
    for number, (tokens, share) in enumerate([(160, 0.6), (320, 0.25), (576, 0.11), (64, 0.9)]):
        h = {"seed": 3100 + 10 * number, "tokens": tokens, "own": 0.3, "mass": 0.3, "noise_seed": 7 + number}
        attention, states = torch.zeros(1, 32, WORDS, tokens), states_of(h)
        attention[:] = text_attention(h)
        whole = torch.zeros(1, 32, tokens + WORDS, tokens + WORDS)
        whole[:, :, tokens:, :tokens] = attention
        words = (torch.zeros(WORDS).long(), torch.arange(WORDS))
        mask, _, scores = code.attn_postprocess_rank(
            whole, 0, tokens, tokens, words, 1, 0, 1, keep_percent=share, image_shape=tokens, use_abs=True
        )
        kept = mask[0].nonzero().flatten()
        pruned = (~mask[0]).nonzero().flatten()
        recycled = int(len(pruned) * 0.3) + 1
        best = scores[0, pruned].topk(recycled).indices
        torch.manual_seed(h["noise_seed"])
        merged = code.cluster_and_merge(states[:, pruned[best]], recycled // 10 + 1)
        outputs = {"kept": kept.short(), "scores": scores[0], "merged": merged[0]}
        yield f"{len(kept)}_of_{tokens}", h | {"count": len(kept)}, outputs


@torch.no_grad()
def main(checkout: Path) -> None:
    folder = checkout / "llava/model/language_model"
    model = functions(
        folder / "modelling_sparse_llama.py", "mutual_information", "calculate_dynamic_k", "generate_keep_percent_abs",
        "cal_sum_tokens_no_membership", np=np, math=math,
    )  # fmt: skip
    rank = functions(folder / "score.py", "attn_postprocess_rank", math=math)
    merge = functions(
        folder / "utils.py", "index_points", "cluster_and_merge", ein=types.SimpleNamespace(rearrange=rearrange)
    )
    for part in (rank, merge):
        vars(model).update(vars(part))
    common = {
        "paper": "arXiv:2509.23931",
        "title": "Each Complexity Deserves a Pruning Policy",
        "repo": "AutoLab-SAI-SJTU/AutoPrune",
        "commit": commit(checkout),
    }
    entries = [
        {
            "method": "autoprune_curve",
            **common,
            "source": ["modelling_sparse_llama.py: mutual_information to cal_sum_tokens_no_membership"],
            "deviations": ["attention of 32 heads: make_autoprune.text_attention; an LLM of 32 layers"],
        },
        {
            "method": "autoprune_layer",
            **common,
            "source": ["score.py: attn_postprocess_rank", "utils.py: cluster_and_merge"],
            "deviations": ["attention as above, hidden states: make_autoprune.states_of; batch 1"],
        },
    ]
    cases = {"autoprune_curve": list(curve_cases(model)), "autoprune_layer": list(layer_cases(model))}
    store("autoprune", entries, cases)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
