"""MustDrop, the half inside the vision encoder: merge each window of similar patches into one token."""

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
    """Merge each window of similar patches into its mean, behind the first layer of the vision encoder.

    A window is merged if the mean cosine of its patches to each other reaches the threshold, so every image keeps its
    own number of tokens. Patches at the right and lower border that fill no window stay. Use it with ``mustdrop-llm``.

    Args:
        threshold: mean cosine from which a window merges.
        window: its height and width, in patches.
        layer: tokens leave behind this layer; a float is a share of the layers that features come from.
        over_batch: every image merges as many windows as the one that has fewest, as in the official code.

    Cost: O(N·D) time and extra memory.
    Paper: "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", 2024.
    Official code: puts merged tokens first, the most similar window before the others; here each stands in the middle
    of its window. In a batch every image merges as many windows as the one with fewest (``over_batch=True``).
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
        batch, total = image.features.shape[:2]
        if image.grid is None or min(image.grid) < self.window:
            raise Refusal(f"{self} needs tokens on a grid of at least a window; got {image.grid or total}")
        index, side = torch.arange(total, device=image.features.device), self.window
        windows = index.view(image.grid).unfold(0, side, side).unfold(1, side, side).reshape(-1, side**2)
        rows = normalise(image.features[:, windows])  # [B, W, side², C]
        # the mean cosine over all pairs of different members, from the length of their sum
        similarity = (rows.sum(-2).square().sum(-1) - side**2) / (side**2 * (side**2 - 1))
        merges = similarity >= self.threshold  # [B, W]
        if self.over_batch:
            rank = similarity.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
            merges = rank < merges.sum(-1).min()
        # members of a merged window go into the token in its middle, all others into themselves
        middle = windows[:, side // 2 * (side + 1), None]
        into = middle.where(merges[..., None], windows).flatten(1)
        target = index.expand(batch, -1).scatter(1, windows.flatten().expand(batch, -1), into)
        stays = target == index
        anchors, valid = padded_nonzero(stays)
        slot = (stays.cumsum(-1) - 1).gather(1, target)  # the number of staying tokens before the target
        sizes = sizes_of(target, total).gather(1, target)
        return image.merge(anchors, slot, index.expand(batch, -1), 1 / sizes, valid=valid)
