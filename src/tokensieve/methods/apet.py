"""ApET: keep the tokens that a few basis tokens approximate worst, and merge the others into these."""

from dataclasses import dataclass
from typing import ClassVar

from tokensieve.budget import Budget
from tokensieve.methods import DecoderMethod, Method, Needs, register
from tokensieve.ops import merge_by_error
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, DecoderTokens, given


@register("apet", paper="arXiv:2602.19870", needs=Needs(patches=True))
@dataclass(frozen=True)
class Apet(Method):
    """Keep a few basis patches and the patches that these approximate worst, and merge the others into the latter.

    The first basis patch is the longest row of the encoder, and each next one is the farthest from those before it. The
    error of a patch is its distance to the best linear combination of the basis. Each other patch is averaged into
    the patch of highest cosine among those kept for their error.

    Args:
        keep: tokens per image, or a share of them (the paper: 96 of 576, then 32 inside the LLM: 64 on average).
        basis: number of basis patches. They stay as they are, at most ``keep`` − 1 of them.
        official_places: put the basis rows at the places of the kept patches of least error, which are lost, and
            average them into the others besides, as the official code does.

    Cost: O(F·N·D) time for F basis patches, O(K·N·D) to merge; O(N·(D + K)) extra memory. No attention is read.
    Paper: "ApET: Approximation-Error Guided Token Compression for Efficient VLMs", CVPR 2026. Its stage inside the LLM
    is ``apet-llm``.
    Official code: draws the first basis patch at random, cannot keep fewer tokens than ``basis`` + 1, merges in
    float16, and renumbers positions (``positions="contiguous"``). See ``official_places``.
    """

    keep: Budget = 64
    basis: int = 10
    official_places: bool = False
    least: ClassVar = {"basis": 1}

    def reduce(self, image: ConnectorTokens) -> Reduction:
        official = "by place" if self.official_places else ""
        entries = merge_by_error(given(image.patches), image.budget, self.basis, official)
        return image.merge(*entries, before_projector=True)


@register("apet-llm", paper="arXiv:2602.19870", stage="decoder")
@dataclass(frozen=True)
class ApetLlm(DecoderMethod):
    """Keep a few basis tokens and the tokens that these approximate worst, and merge the others into the latter.

    It is the step of ``apet``, on the hidden states of the LLM.

    Args:
        keep: tokens per image from layer ``layer`` on, or a share of those that entered the LLM (the paper: 32 of 96).
        average: instead of ``keep``, tokens averaged over all layers.
        layer: the first layer that receives the shorter sequence; a float is a share of the depth (the paper: 16 of
            32).
        basis: as in ``apet``.
        official_places: as in ``apet``, the first basis row at the place of the largest of these errors.

    Cost: as of ``apet``.
    Paper: as of ``apet``.
    Official code: as of ``apet``.
    """

    keep: Budget = 0.333
    average: Budget | None = None
    layer: int | float = 0.5
    basis: int = 10
    official_places: bool = False
    least: ClassVar = {"basis": 1}

    def reduce(self, image: DecoderTokens) -> Reduction:
        official = "by error" if self.official_places else ""
        return image.merge(*merge_by_error(image.features, image.budget, self.basis, official))
