"""Simignore: drop the visual tokens that resemble no word of the question."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import Needs, ScoreMethod, register
from tokensieve.ops import normalise, text_similarity
from tokensieve.tokens import ConnectorTokens, given


@register("simignore", paper="arXiv:2412.09817", needs=Needs(user_text=True))
@dataclass(frozen=True)
class Simignore(ScoreMethod):
    """Keep the visual tokens with the largest cosine to any word of the prompt: an accuracy method at mild budgets.

    Args:
        keep: tokens per image, or a share of them (the paper: 452 of 576).
        start, step: the first pair and the stride of a walk over the pairs of visual token and word, in the order of
            their cosine, until it has met enough tokens; the official code starts at 1 and so skips the best pair.

    Cost: O(N·M·D) time and O(N·M) extra memory for M words.
    Paper: "Enhancing Multimodal Large Language Models Complex Reason via Similarity Computation", AAAI 2025.
    Official code: skips the best pair (``start=1``), and masks the other tokens, which saves no time; here they leave.
    """

    keep: Budget = 0.785
    start: int = 0
    step: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start < 0 or self.step < 1:
            raise Refusal(f"start must be at least 0 and step at least 1; got {self.start} and {self.step}")

    @property
    def by_score(self) -> bool:
        return not self.start and self.step == 1  # other walks rank the pairs of each image by themselves

    def score(self, image: ConnectorTokens) -> Tensor:
        text = given(image.user_text)
        if self.by_score:  # this walk meets every token first at its best word
            return text_similarity(image.features, text.features, text.mask, "tokens")
        return self.walk(normalise(image.features) @ normalise(text.features).transpose(-1, -2), text.mask)

    def walk(self, cosines: Tensor, mask: Tensor) -> Tensor:
        """Return minus the step at which the walk meets each token, `[B, N, M]` to `[B, N]`; never met: the least."""
        batch, total, words = cosines.shape
        pairs = cosines.masked_fill(~mask[:, None], -torch.inf).flatten(1)
        order = pairs.sort(dim=-1, descending=True, stable=True).indices[:, self.start :: self.step]
        step = torch.arange(order.shape[1], device=order.device, dtype=torch.float32).expand_as(order)
        never = step.new_full((batch, total), total * words)
        token = order.div(words, rounding_mode="floor")  # pair p is of token p // words
        return -never.scatter_reduce(-1, token, step, "amin")
