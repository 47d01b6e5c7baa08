"""VideoLLM-MoD: in every second layer of the LLM, most tokens of each frame skip the layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokensieve.budget import Budget, count
from tokensieve.methods import register
from tokensieve.methods.skip import SkipMethod
from tokensieve.ops import top_k_per_group
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens


@register("videollm-mod", paper="arXiv:2408.16730", stage="decoder", trained=True)
@dataclass(frozen=True)
class VideoLlmMod(SkipMethod):
    """Let a trained router choose, in some layers, the tokens of each frame that take part; the others skip the layer.

    The router maps a token's state to a weight a. A token x that takes part is x + a·(layer(x) − x) behind the layer,
    and one that skips is x. The tokens with the largest weights take part, equally many of each frame of a video; an
    image is one frame. No token leaves for good.

    Args:
        weights: "random" (all weights are 1, so that the first tokens of each frame take part), or a folder
            of ``tokensieve train videollm-mod``.
        keep: tokens that take part, of each image or video, or a share of them (the paper: 0.2 of each frame).
        step: layers 1, 1 + step, 1 + 2·step, … have a router.

    Cost: O(N·D) time for each layer that tokens skip, and one more copy of the hidden states, O(N·D) extra memory.
    Paper: "VideoLLM-MoD: Efficient Video-Language Streaming with Mixture-of-Depths Vision Computation", NeurIPS 2024.
    Official code: none. This is our reading. The layers, the start of all weights at 1 (the unscaled layer), and one
    budget for whole images are ours. The authors tune the LLM with the routers; here the routers are trained alone.
    """

    keep: Budget = 0.2
    step: int = 2

    least: ClassVar = {"step": 1}
    scales = "layer"

    def factors(self, scores: Tensor) -> Tensor:
        return 1 + scores

    def layer_numbers(self, depth: int) -> list[int]:
        return list(range(1, depth, self.step))

    def stage_budgets(self, total: int, layers: Sequence[int], depth: int) -> list[int]:
        return [count(self.keep, total)] * len(layers)

    def reduce(self, image: DecoderTokens) -> Reduction:
        scores = self.score(image)
        return image.keep(top_k_per_group(scores.detach(), image.budget, image.frames or 1), scores)
