"""Simignore: ignore the visual tokens that resemble no word of the question."""

from dataclasses import dataclass

from tokensieve.budget import Budget
from tokensieve.methods.base import Method, Needs
from tokensieve.methods.registry import register
from tokensieve.ops import normalise, text_similarity, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


@register("simignore", paper="arXiv:2412.09817", needs=Needs(text=True))
@dataclass(frozen=True)
class Simignore(Method):
    """Keep the visual tokens with the largest cosine to any word of the prompt: an accuracy method at mild budgets.

    Args:
        keep: tokens per image, or a share of them (the paper: 452 of 576).
        skip_best: leave out the single best pair, as the official code does by starting its walk at the second.

    Paper: "Enhancing Multimodal Large Language Models Complex Reason via Similarity Computation", AAAI 2025. The
    official code masks the others, which saves nothing; here they leave.
    """

    keep: Budget = 0.785
    skip_best: bool = False

    def reduce(self, image: VisualTokens) -> Reduction:
        words, mask = image.words()
        scores = text_similarity(image.features, words, mask, "tokens")
        if self.skip_best:
            pairs = normalise(image.features) @ normalise(words).transpose(-1, -2)
            pairs = pairs.masked_fill(~mask[:, None], -1).flatten(1)
            pairs = pairs.scatter(-1, pairs.argmax(-1, keepdim=True), -1)
            scores = pairs.view(len(pairs), image.total, -1).amax(-1)
        return image.keep(top_k(scores, image.count(self.keep)), scores)
