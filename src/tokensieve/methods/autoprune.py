"""AutoPrune: drop tokens before every layer, along a curve whose slope follows the image and the question."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget, check_number
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, DecoderNeeds, register
from tokensieve.methods.recycling import recycle, recycled_and_clusters
from tokensieve.ops import top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens, given


@register(
    "autoprune", paper="arXiv:2509.23931", stage="decoder", needs=DecoderNeeds(user_text="all", attention="words")
)
@dataclass(frozen=True)
class AutoPrune(DecoderMethod):
    """Drop the tokens that the text attends to least before every layer, along a logistic curve.

    The curve over layers x is ``0.75 / (1 + exp(k * (x - centre - k)))``, scaled to the average ``keep``. Its slope
    ``k = max(0, k0 - gamma * I)`` follows the mutual information I of text and visual tokens in the attention of the
    layer before ``layer``. The best pruned tokens are recycled as in ``sparsevlm``, and count.

    Args:
        keep: tokens averaged over all layers of the LLM, or a share of those that entered: of every image alike, since
            only the numbers of single layers adapt.
        layer: tokens leave before this and every later layer; a float is a share of the depth (official: 2 of 32).
        k0, gamma: slope without information, and its change per bit; for an LLM of 32 layers with 32 heads.
        centre: the layer of half height, in an LLM of 32 layers.
        recycle: share of the pruned tokens that is clustered in each layer.
        appended, noise_seed: as of ``sparsevlm``; the official code is ``appended=True`` with noise.

    Cost: in every layer that of ``sparsevlm`` in one, with all text after the image in place of the user's words.
    Paper: "Each Complexity Deserves a Pruning Policy", NeurIPS 2025.
    Official code: first keeps 2.5 times the budget, nearly all by [CLS] attention; here a connector method does this:
    ``"fastervlm(keep=160) + autoprune(keep=64)"``. Counts the first layer as so reduced, and the others one layer
    early: its 64 is about 82 over all layers. Renumbers positions (``positions="contiguous"``).
    """

    keep: Budget = 0.333
    layer: int | float = 0.0625
    k0: float = 0.4
    gamma: float = 0.2
    centre: float = 14.9
    recycle: float = 0.3
    appended: bool = False
    noise_seed: int | None = None
    adaptive: ClassVar = True
    proportions: ClassVar = ("recycle",)

    @property
    def mean(self) -> Budget:
        return self.keep

    def layer_numbers(self, depth: int) -> list[int]:
        return list(range(super().layer_numbers(depth)[0], depth))

    def stage_budgets(self, total: int, layers: Sequence[int], depth: int) -> list[int]:
        return self.curve(total, layers, depth, self.k0)

    def schedule(self, image: DecoderTokens, layers: Sequence[int], depth: int) -> list[list[int]]:
        slopes = (self.k0 - self.gamma * information(image)).clamp(min=0)
        return [self.curve(image.total, layers, depth, slope) for slope in slopes.tolist()]

    def curve(self, total: int, layers: Sequence[int], depth: int, slope: float) -> list[int]:
        """Return the tokens that stay before each of the layers, by bisection of the curve's scale.

        Raises:
            Refusal: if the average is out of reach, because all tokens pass the first layers.
        """
        keep = check_number(self.keep)
        target = depth * (keep if isinstance(keep, int) else max(1, keep * total))  # a share leaves one token at least
        if target >= depth * total:
            return [total] * len(layers)
        if target <= (lowest := layers[0] * total + len(layers)):
            why = f"all pass the first {layers[0]} of {depth} layers; reachable: above {lowest / depth:g}"
            raise Refusal(f"{self}: an average of {target / depth:g} of {total} tokens is out of reach: {why}")
        positions = ((number - 1) * 32 / depth for number in layers)  # the authors count from the layer before
        shares = [0.75 / (1 + math.exp(min(slope * (x - self.centre - slope), 700))) for x in positions]
        low, high, best, nearest = 0.0, 20.0, [total] * len(layers), math.inf
        for _ in range(60):
            middle, counts, through, left = (low + high) / 2, [], layers[0] * total, total
            for share in shares:
                counts.append(max(1, min(math.ceil((total - 1) * middle * share), left)))
                left = counts[-1] + recycled_and_clusters(left - counts[-1], self.recycle)[1]
                through += left
            if abs(through - target) < nearest:
                nearest, best = abs(through - target), counts
            low, high = (middle, high) if through < target else (low, middle)
        return best

    def reduce(self, image: DecoderTokens) -> Reduction:
        # summed over the words, which ranks like the mean
        scores = (given(image.attention).mean(1) * given(image.user_text).mask[..., None]).sum(1)
        return recycle(image, scores, top_k(scores, image.budget), self.recycle, self.appended, self.noise_seed)


def information(image: DecoderTokens) -> Tensor:
    """Return the mutual information of text and visual tokens in bits, summed over heads as if they were 32, `[B]`."""
    mask = given(image.user_text).mask[:, None, :, None]
    words = mask.sum(2, keepdim=True)
    joint = given(image.attention) * mask / words  # p(word, token) of equally likely words, [B, H, M, N]
    ratio = joint / (joint.sum(2, keepdim=True) / words + 1e-6)
    return 32 * (joint * torch.log2(ratio.clamp(min=1e-6))).sum((-1, -2)).mean(1)
