"""CDPruner: keep tokens that differ from each other and are relevant to the prompt."""

from dataclasses import dataclass

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import dpp_map, text_similarity
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given

SUBSTITUTE = "no CLIP text encoder: relevance is the cosine with the mean of the words in the LLM's input space"


@register("cdpruner", paper="arXiv:2506.10967", needs=Needs(user_text=True))
@dataclass(frozen=True)
class CdPruner(Method):
    """Keep the most likely tokens of a determinantal point process: unlike each other, and relevant to the prompt.

    The paper takes relevance from CLIP's joint space, as the negated cosine of patch and text. Hugging Face VLMs come
    without CLIP's text encoder, so relevance is the plain cosine with the mean of the words in the LLM's input space,
    and a note records that. Relevance is scaled to (0, 1] over the image.

    Args:
        keep: tokens per image, or a share of them.
        over_batch: scale relevance over all images of the call, as the official code does; the tokens that an image
            keeps then depend on the other images.

    Cost: O(K·N·(D + K)) time, by incremental Cholesky; O(K·N) extra memory, and the `[N, N]` kernel up to 1,024 tokens.
    Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS 2025.
    Official code: scales relevance over the whole batch (``over_batch=True``) and renumbers positions
    (``positions="contiguous"``). It selects tokens twice if more are kept than the features have dimensions (the root
    of a negative rest is no number), or if all relevances are equal; here all tokens are distinct, and equal
    relevances count as 1. It normalises features in the model's precision: in halves single tokens can differ.
    """

    keep: Budget = 64
    over_batch: bool = False

    def reduce(self, image: ConnectorTokens) -> Reduction:
        text = given(image.user_text)
        relevance = text_similarity(image.features, text.features, text.mask, "prompt")  # [B, N]
        dims = (0, 1) if self.over_batch else (1,)
        low, high = relevance.amin(dims, keepdim=True), relevance.amax(dims, keepdim=True)
        # the kernel is diag(quality) · cosines · diag(quality); 1e-6 keeps the least relevant token possible
        quality = (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)
        return image.noted(SUBSTITUTE).keep(dpp_map(image.features, quality, image.budget), quality)
