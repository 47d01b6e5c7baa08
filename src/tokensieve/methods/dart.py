"""DART: keep a few pivots and the tokens that duplicate them least."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, DecoderNeeds, register
from tokensieve.ops import normalise, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens, given


@register(
    "dart", paper="arXiv:2502.11494", stage="decoder", needs=DecoderNeeds(user_text=True, keys=True, final_norm=True)
)
@dataclass(frozen=True)
class Dart(DecoderMethod):
    """Keep the visual tokens that duplicate a few pivot tokens least, and the visual pivots themselves.

    Pivots are the visual tokens and the words with the largest L1 norm of their keys. In turn, each pivot takes the
    remaining tokens of lowest cosine to it (after the LLM's final norm).

    Args:
        keep: tokens per image from layer ``layer`` on, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all layers.
        layer: the first layer that receives the shorter sequence.
        visual_pivots, text_pivots: number of pivots of each kind.
        exact: keep exactly the budget; else ``visual_pivots + pivots * (budget // pivots)``, as the official code.

    Cost: O(P·N·D) time and O(P·N) extra memory for P pivots, and the LLM's final norm of its states; no attention is
    read.
    Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025.
    Official code: visits pivots in the iteration order of a Python set; here by decreasing norm, visual ones first. It
    rounds the budget: ``exact=False``.
    """

    keep: Budget = 0.222
    average: Budget | None = None
    layer: int | float = 2
    visual_pivots: int = 4
    text_pivots: int = 4
    exact: bool = True
    least: ClassVar = {"visual_pivots": 0, "text_pivots": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.visual_pivots + self.text_pivots:
            raise Refusal("visual_pivots and text_pivots cannot both be 0")

    def reduce(self, image: DecoderTokens) -> Reduction:
        text = given(image.user_text)
        norms = given(image.keys).float().norm(1, -1)
        text_norms = given(text.keys).float().norm(1, -1).masked_fill(~text.mask, -torch.inf)
        visual = norms.topk(min(self.visual_pivots, image.budget), -1).indices
        # a prompt of fewer words repeats its pivots, so that every image of a batch has equally many
        rank = torch.arange(self.text_pivots, device=norms.device) % text.mask.sum(-1, keepdim=True)
        words = text_norms.sort(dim=-1, descending=True, stable=True).indices.gather(-1, rank)
        visual_rows = image.features.take_along_dim(visual[..., None], 1)
        pivots = torch.cat([visual_rows, text.features.take_along_dim(words[..., None], 1)], 1)
        return image.keep(least_alike(image.features, pivots, visual, self.shares(image, visual.shape[-1])))

    def shares(self, image: DecoderTokens, visual: int) -> list[int]:
        """Return the number of tokens that each pivot adds to the ``visual`` pivots."""
        pivots = visual + self.text_pivots
        if self.exact:  # cumulative rounding: the shares differ by one at most and sum to the spare budget
            spare = image.budget - visual
            return [spare * (turn + 1) // pivots - spare * turn // pivots for turn in range(pivots)]
        return [min(image.budget, image.total - visual) // pivots] * pivots


def least_alike(rows: Tensor, pivots: Tensor, taken: Tensor, shares: list[int]) -> Tensor:
    """Return ``taken`` `[B, T]` and, for each pivot in turn, the ``shares[turn]`` other rows of lowest cosine to it.

    Args:
        rows: `[B, N, D]`.
        pivots: `[B, P, D]`.
    """
    similarity = normalise(rows) @ normalise(pivots).transpose(-1, -2)
    for turn, share in enumerate(shares):
        # a taken row scores −inf, so no later pivot takes the row again
        scores = (-similarity[..., turn]).scatter(-1, taken, -torch.inf)
        taken = torch.cat([taken, top_k(scores, share)], -1)
    return taken
