"""MMTok: keep tokens that cover the words of the question, and the image."""

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
    """Keep, greedily, the tokens that best cover each word of the prompt and each patch of the image.

    Token j covers word i by the share of j in the softmax of i's cosines to all tokens in the LLM's input space, and
    patch i by the same share among the encoder's rows.

    Args:
        keep: tokens per image, or a share of them.
        balance: weight of the image against the words.
        text_temperature, image_temperature: of the two softmaxes.

    Cost: O(N·(N + M)·D) time for the gains of all tokens, then K lazy steps over the 16 best or more;
    O(N·(min(N, 1,024) + M)) extra memory.
    Paper: "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026.
    Official code: does not choose patches that show padding of the picture only, which no processor reports to a model;
    renumbers positions (``positions="contiguous"``).
    """

    keep: Budget = 64
    balance: float = 0.5
    text_temperature: float = 0.02
    image_temperature: float = 0.2

    def reduce(self, image: ConnectorTokens) -> Reduction:
        text = given(image.user_text)
        cosines = normalise(text.features) @ normalise(image.features).transpose(-1, -2)
        word_weight = text.mask / text.mask.sum(-1, keepdim=True)  # 0 for padding
        by_word = (cosines / self.text_temperature).softmax(-1) * word_weight[..., None]  # [B, M, N]
        by_token, rows = by_word.mT.contiguous(), normalise(given(image.patches))
        similarity = gram(rows) if image.total <= CHUNK else None

        def exponentials(cosines: Tensor) -> Tensor:
            """Return the terms of the softmax, before they are divided by their sum; no cosine exceeds 1."""
            return ((cosines - 1) / self.image_temperature).exp_()

        parts = [similarity] if similarity is not None else (part @ rows.mT for part in torch.split(rows, CHUNK, 1))
        sums = torch.cat([exponentials(part).sum(-1) for part in parts], 1)
        # entry (j, i) of the table is token j's share in the softmax of patch i: column i is divided by sums[i]
        scale = (self.balance / image.total / sums)[:, None]

        def covers(index: Tensor) -> Tensor:
            by_patch = exponentials(rows_at(rows, index) @ rows.mT) * scale
            return torch.cat([rows_at(by_token, index), by_patch], -1)

        # above CHUNK tokens the table of N x (M + N) is never held whole: its rows are computed when they are needed
        table = covers if similarity is None else torch.cat([by_token, exponentials(similarity) * scale], -1)
        return image.keep(coverage(table, sums, image.budget))
