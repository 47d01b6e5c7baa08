"""MustDrop, the half inside the vision tower: windows of patches that are all alike become one token each."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokensieve.errors import Refusal
from tokensieve.methods import EncoderMethod, EncoderNeeds, register
from tokensieve.ops import normalise, padded_nonzero, sizes_of
from tokensieve.reduction import Reduction
from tokensieve.tokens import EncoderTokens


@register("mustdrop-encoder", paper="arXiv:2411.10803", stage="encoder", needs=EncoderNeeds(grid=True))
@dataclass(frozen=True)
class MustDropEncoder(EncoderMethod):
    """Behind the first layer of the vision tower, merge each window of patches that are all alike into its mean.

    How many tokens are left is the image's own: windows count whose patches' mean cosine to each other reaches the
    threshold. What fills no window at the right and lower border stays. Goes together with ``mustdrop-llm``.

    Args:
        threshold: mean cosine from which a window merges.
        window: its height and width, in patches.
        layer: behind which layer; a float is a share of the layers that features come from.
        over_batch: every image merges as many windows as the one that has fewest, as in the official code.

    Cost: O(N·D) time and extra memory.
    Paper: "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", 2024. The official
    code puts merged tokens first; here each stands in the middle of its window.
    """

    after_layer: ClassVar[bool] = True

    threshold: float = 0.8
    window: int = 3
    layer: int | float = 0
    over_batch: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.window, int) or self.window < 2:
            raise Refusal(f"window must be a whole number of patches >= 2; got {self.window!r}")

    def reduce(self, image: EncoderTokens) -> Reduction:
        batch, n = image.features.shape[:2]
        if image.grid is None or min(image.grid) < self.window:
            raise Refusal(f"{self} needs tokens on a grid of at least a window; got {image.grid or n}")
        place, side = torch.arange(n, device=image.features.device), self.window
        windows = place.view(image.grid).unfold(0, side, side).unfold(1, side, side).reshape(-1, side**2)
        rows = normalise(image.features[:, windows])  # [B, W, side², C]
        # the mean cosine over all pairs of different members, from the length of their sum
        alike = (rows.sum(-2).square().sum(-1) - side**2) / (side**2 * (side**2 - 1))
        even = alike >= self.threshold
        if self.over_batch:
            rank = alike.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
            even = rank < even.sum(-1).min()
        joined = windows[:, side // 2 * (side + 1), None].where(even[..., None], windows).flatten(1)
        target = place.expand(batch, -1).scatter(1, windows.flatten().expand(batch, -1), joined)
        stays = target == place
        anchors, valid = padded_nonzero(stays)
        slot = (stays.cumsum(-1) - 1).gather(1, target)
        sizes = sizes_of(target, n).gather(1, target)
        return image.merge(anchors, slot, place.expand(batch, -1), 1 / sizes, valid=valid)
