"""PixelPrune: drop the tokens whose pixels follow from their neighbours, before the vision encoder."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokensieve.errors import Refusal
from tokensieve.methods import PixelMethod, register
from tokensieve.ops import padded_nonzero
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


@register("pixelprune", paper="arXiv:2604.00886", stage="encoder")
@dataclass(frozen=True)
class PixelPrune(PixelMethod):
    """Drop the tokens whose pixels equal those predicted from their neighbours, before the vision encoder.

    Each token is predicted as a copy of its left neighbour. Where an edge runs down between its upper-left and
    its upper neighbour (the upper-left one equals the left one, but not the upper one), it is predicted as a copy of
    the upper one. A token that equals its prediction leaves: its pixels can be rebuilt from those before it. The
    first token always stays. An image without equal neighbours, such as a photograph, stays whole.

    Args:
        tolerance: the largest difference of a pixel at which two tokens count as equal. White is 1 and black 0, so one
            of 256 levels is 1/255. With 0, the dropped pixels can be rebuilt exactly. Above 0, a neighbour that left is
            compared by the kept pixels that it is rebuilt from, so differences do not add up.

    Cost: O(N·d) time and memory for the d pixels of a token, in one step for 0 and in one step per diagonal of the
        image above 0. The vision encoder and the LLM then process K tokens instead of N.
    Paper: "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding", 2026.
    Official code: makes the same decision (scan ``pred_2d``, metric ``max``, both its defaults), for Qwen3-VL and
        Qwen3.5. It assumes pixels normalised by mean and deviation 0.5; Qwen2-VL and Qwen2.5-VL have those of CLIP
        here. Its transformers patch is for one sample at a time; any batch works here.
    """

    tolerance: float = 0.0

    proportions: ClassVar[tuple[str, ...]] = ("tolerance",)

    def reduce(self, image: VisualTokens) -> Reduction:
        if image.grid is None:
            raise Refusal(f"{self.info.name} needs tokens on a grid; these {image.total} tokens have none")
        decide = partial(_follows_within, tolerance=self.tolerance) if self.tolerance else _follows
        kept = torch.stack([~decide(pixels.unflatten(0, image.grid)).flatten() for pixels in image.features])
        anchors, valid = padded_nonzero(kept)
        return image.keep(anchors, valid=None if bool(valid.all()) else valid)


def _follows(pixels: Tensor) -> Tensor:
    """Return the tokens that equal their prediction, `[h, w]` bool, from their pixels `[h, w, d]`."""
    # equality is transitive: a neighbour that left is a copy of what it is rebuilt from, so all can be compared at once
    as_left = pad((pixels[:, 1:] == pixels[:, :-1]).all(-1), (1, 0))
    as_upper = pad((pixels[1:] == pixels[:-1]).all(-1), (0, 0, 1, 0))
    # the upper-left token equals the left one where the left one equals its own upper neighbour
    edge = as_upper.roll(1, 1) & ~as_left.roll(1, 0)
    edge[0], edge[:, 0] = False, True  # at the borders only one neighbour exists
    return torch.where(edge, as_upper, as_left)


def _follows_within(pixels: Tensor, tolerance: float) -> Tensor:
    """Return the same as :func:`_follows` for tokens that count as equal within a tolerance."""
    height, width, _ = pixels.shape
    rows = pixels.flatten(0, 1)
    token = torch.arange(height * width, device=pixels.device)
    row, column = token // width, token % width
    rebuilt_from = token.clone()  # [N]: the kept token that has the pixels by which a token is rebuilt

    def equal(a: Tensor, b: Tensor) -> Tensor:
        return (rows[a] - rows[b]).abs().amax(-1) <= tolerance

    for diagonal in range(1, height + width - 1):  # the neighbours of its tokens lie on the two diagonals before
        first = max(0, diagonal - width + 1)
        tokens = torch.arange(first, min(diagonal, height - 1) + 1, device=rows.device) * (width - 1) + diagonal
        # at the borders only one neighbour exists: it takes the part of all three
        left = rebuilt_from[torch.where(column[tokens] > 0, tokens - 1, tokens - width)]
        upper = torch.where(row[tokens] > 0, rebuilt_from[tokens - width], left)
        corner = torch.where((row[tokens] > 0) & (column[tokens] > 0), rebuilt_from[tokens - width - 1], upper)
        predicted = torch.where(equal(corner, left) & ~equal(corner, upper), upper, left)
        rebuilt_from[tokens] = torch.where(equal(tokens, predicted), predicted, tokens)
    return (rebuilt_from != token).view(height, width)
