"""MMTok: tokens that cover the words of the question, and the image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import CHUNK, coverage, gram, normalise, rows_at
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given


@register("mmtok", paper="arXiv:2508.18264", needs=Needs(user_text=True, patches=True))
@dataclass(frozen=True)
class MmTok(Method):
    """Greedily keep the tokens that cover two things best: each word of the prompt, and each patch of the image.

    How well token j covers word i is the share that j has in the softmax of i's cosines to all tokens in the LLM's
    input space; how well it covers patch i, the same among the encoder's rows.

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

    def reduce(self, image: ConnectorTokens) -> Reduction:
        text = given(image.user_text)
        mask = text.mask
        cosines = normalise(text.features) @ normalise(image.features).transpose(-1, -2)
        asked = (cosines / self.text_temperature).softmax(-1) * (mask / mask.sum(-1, keepdim=True))[..., None]
        by_token, rows = asked.mT.contiguous(), normalise(given(image.patches))
        whole = gram(rows) if image.total <= CHUNK else None

        def shares(cosines: Tensor) -> Tensor:  # of the softmax, up to its sum; no cosine exceeds 1
            return ((cosines - 1) / self.image_temperature).exp_()

        parts = [whole] if whole is not None else (part @ rows.mT for part in torch.split(rows, CHUNK, 1))
        sums = torch.cat([shares(part).sum(-1) for part in parts], 1)
        scale = (self.balance / image.total / sums)[:, None]

        def covers(index: Tensor) -> Tensor:
            return torch.cat([rows_at(by_token, index), shares(rows_at(rows, index) @ rows.mT) * scale], -1)

        table = covers if whole is None else torch.cat([by_token, shares(whole) * scale], -1)
        return image.keep(coverage(table, sums, image.budget))
