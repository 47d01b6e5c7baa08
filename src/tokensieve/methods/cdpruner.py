"""CDPruner: diverse tokens, on condition that the question cares for them."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods.base import Method, Needs
from tokensieve.methods.registry import register
from tokensieve.ops import dpp_map, normalise, text_similarity
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens

SUBSTITUTE = "no CLIP text encoder: relevance is the cosine with the mean of the words in the LLM's input space"


@register("cdpruner", paper="arXiv:2506.10967", needs=Needs(text=True))
@dataclass(frozen=True)
class CdPruner(Method):
    """Keep the most likely tokens of a determinantal point process: unlike each other, and relevant to the prompt.

    Relevance is compared in CLIP's joint space, where a patch resembles a text the less, the more it shows of it: so
    the cosine is negated there. It is scaled to (0, 1] over the image.

    Args:
        keep: tokens per image, or a share of them.
        space: "joint" insists on CLIP's joint space, "llm" takes the LLM's input space with the plain cosine, "auto"
            is the first where the model has it, else the second, with a note.
        over_batch: scale relevance over all images of the call, as the official code does; then what an image keeps
            depends on its neighbours.

    Cost: O(K·N·(D + K)) time, by incremental Cholesky; O(K·N) extra memory, and the `[N, N]` kernel up to 1,024 tokens.
    Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS 2025.
    Official code: scales relevance over the whole batch (``over_batch=True``) and renumbers positions
    (``positions="contiguous"``).
    """

    keep: Budget = 64
    space: Literal["auto", "joint", "llm"] = "auto"
    over_batch: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(joint=True) if self.space == "joint" else Needs(text=True)

    def reduce(self, image: VisualTokens) -> Reduction:
        joint = self.space == "joint" or (self.space == "auto" and image.joint is not None)
        if not joint:
            image = replace(image, notes=(*image.notes, SUBSTITUTE))
        relevance = self.relevance(image, joint)
        dims = tuple(range(0 if self.over_batch else 1, 2))
        low, high = relevance.amin(dims, keepdim=True), relevance.amax(dims, keepdim=True)
        quality = (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)
        return image.keep(dpp_map(image.features, quality, image.count(self.keep)), quality)

    def relevance(self, image: VisualTokens, joint: bool) -> Tensor:
        """How much the prompt cares for each token, `[B, N]`."""
        if joint:
            texts = normalise(image.given("joint_text"))
            return -(normalise(image.given("joint")) @ texts.transpose(-1, -2)).mean(-1)
        return text_similarity(image.features, *image.words(), "prompt")
