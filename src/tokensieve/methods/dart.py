"""DART: a few pivots, and for each of them the tokens that resemble it least."""

from dataclasses import dataclass

import torch

from tokensieve.budget import Budget
from tokensieve.methods.base import DecoderMethod, Needs, check_blocks
from tokensieve.methods.registry import register
from tokensieve.ops import normalise, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


@register("dart", paper="arXiv:2502.11494", stage="decoder", needs=Needs(text=True, keys=True, normed=True))
@dataclass(frozen=True)
class Dart(DecoderMethod):
    """Keep the visual tokens that duplicate a few pivot tokens least, and the visual pivots themselves.

    Pivots are the visual tokens and the words with the largest L1 norm of their keys; in turn, each takes the tokens of
    lowest cosine to it (after the LLM's final norm) that nobody has taken.

    Args:
        keep: tokens per image from block ``layer`` on, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all blocks.
        layer: the first block that sees the shorter sequence.
        visual_pivots, text_pivots: how many of each.

    Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025. The
    official code visits pivots in the order of a Python set and keeps ``visual_pivots + pivots * (budget // pivots)``
    tokens; here they are visited by decreasing norm, visual ones first, and the budget is exact.
    """

    keep: Budget = 0.222
    average: Budget | None = None
    layer: int | float = 2
    visual_pivots: int = 4
    text_pivots: int = 4

    def stages(self, depth: int) -> list[int]:
        return check_blocks([self.layer], depth)

    def reduce(self, image: VisualTokens) -> Reduction:
        words, mask = image.words()
        norms = image.given("keys").float().norm(1, -1)
        text_norms = image.given("text_keys").float().norm(1, -1).masked_fill(~mask, -torch.inf)
        wanted = self.wanted(image)
        kept = norms.topk(min(self.visual_pivots, wanted), -1).indices
        text = text_norms.topk(min(self.text_pivots, words.shape[1]), -1).indices
        rows, words = normalise(image.features), normalise(words)
        pivots = torch.cat([rows.take_along_dim(kept[..., None], 1), words.take_along_dim(text[..., None], 1)], 1)
        left, turns = wanted - kept.shape[1], pivots.shape[1]
        for turn in range(turns):
            share = (left * (turn + 1)) // turns - (left * turn) // turns
            unlike = -(rows @ pivots[:, turn, :, None]).squeeze(-1)
            kept = torch.cat([kept, top_k(unlike.scatter(-1, kept, -torch.inf), share)], -1)
        return image.keep(kept)
