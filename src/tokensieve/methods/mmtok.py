"""MMTok: tokens that cover the words of the question, and the image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods.base import Method, Needs
from tokensieve.methods.registry import register
from tokensieve.ops import CHUNK, coverage, normalise, rows_at
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


@register("mmtok", paper="arXiv:2508.18264", needs=Needs(text=True, patches=True))
@dataclass(frozen=True)
class MmTok(Method):
    """Greedily keep the tokens that cover two things best: each word of the prompt, and each patch of the image.

    How well token j covers word i is the share that j has in the softmax of i's cosines to all tokens in the LLM's
    input space; how well it covers patch i, the same among the encoder's rows. Patches of padding are covered like any
    other, but not chosen.

    Args:
        keep: tokens per image, or a share of them.
        balance: weight of the image against the words.
        text_temperature, image_temperature: of the two softmaxes.

    Cost: O(N·(N + M)·D) time for the gains of all tokens, then K lazy steps over the 16 best or more;
    O(N·(min(N, 1,024) + M)) extra memory.
    Paper: "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026.
    Official code: renumbers positions (``positions="contiguous"``).
    """

    keep: Budget = 64
    balance: float = 0.5
    text_temperature: float = 0.02
    image_temperature: float = 0.2

    def reduce(self, image: VisualTokens) -> Reduction:
        words, mask = image.words()
        cosines = normalise(words) @ normalise(image.features).transpose(-1, -2)
        asked = (cosines / self.text_temperature).softmax(-1) * (mask / mask.sum(-1, keepdim=True))[..., None]
        by_token = asked.transpose(-1, -2)
        rows = normalise(image.given("patches"))
        scaled = rows.transpose(-1, -2) / self.image_temperature
        similar = rows @ scaled if image.total <= CHUNK else None  # a single chunk is kept
        chunks = (part @ scaled for part in torch.split(rows, CHUNK, dim=1)) if similar is None else [similar]
        total = torch.cat([chunk.logsumexp(-1) for chunk in chunks], 1)[:, None]

        def covers(index: Tensor) -> Tensor:
            near = rows_at(rows, index) @ scaled if similar is None else rows_at(similar, index)
            return torch.cat([rows_at(by_token, index), (near - total).exp() * (self.balance / image.total)], -1)

        eligible = None if image.padding is None else (~image.padding).float()
        return image.keep(coverage(covers, total[:, 0], image.count(self.keep), eligible))
