"""DyCoke, the half before the LLM: drop the repeated tokens in windows of four frames."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import in_proportion, padded_nonzero, same_place_cosine
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens

LOOK_BACK = (0, 1, 2, 1)  # distance from each frame of a window to the earlier frame that it is compared with


@register("dycoke", paper="arXiv:2411.15024", needs=Needs(video=True))
@dataclass(frozen=True)
class DyCoke(Method):
    """Keep the first of every four frames whole, and of the others the tokens least similar to an earlier frame.

    The second frame and the third are compared with the first, the fourth with the third, token by token at equal
    positions; a share of each is dropped.

    Args:
        drop: the share of each frame that is dropped, unless the frame is kept whole (the paper's K: 0.5, 0.7 or 0.9).
        keep: instead of ``drop``, tokens per video, or a share of them; never less than the frames that stay whole.

    Cost: O(N·D) time, O(N·log n) to sort frames of n tokens; O(N) extra memory.
    Paper: "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", CVPR 2025. The half that
    prunes the KV cache while decoding is left out. The official code drops the last frame of an odd number and leaves
    the third frame of the last window whole; here they are frames like any other.
    """

    keep: Budget | None = None
    drop: float = 0.7
    proportions: ClassVar = ("drop",)

    def reduce(self, image: ConnectorTokens) -> Reduction:
        frames = image.in_frames(image.features)
        number, size = torch.arange(frames.shape[1], device=frames.device), frames.shape[2]
        earlier = number - torch.tensor(LOOK_BACK, device=number.device)[number % 4]
        similarity = same_place_cosine(frames, earlier)  # [B, T, n]
        whole = torch.where(number % 4 == 0, size, 0)  # tokens of the frames that stay whole, 0 for the others
        if self.keep is None:
            quota = whole.where(whole > 0, round(size * (1 - self.drop)))
        else:
            quota = whole + in_proportion(max(0, image.budget - int(whole.sum())), size - whole)
            if int(quota.sum()) > image.budget:
                image = image.noted(f"every fourth frame is kept: {int(quota.sum())} tokens, more than the budget")
        rank = similarity.argsort(dim=-1, stable=True).argsort(-1)  # 0: the least similar token of its frame
        kept, _ = padded_nonzero((rank < quota[:, None]).flatten(1))
        return image.keep(kept, (1 - similarity).flatten(1))
