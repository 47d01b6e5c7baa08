"""V-CAST: more tokens for the frames where the video turns, and in each frame the unusual and the long rows."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, pad

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import CHUNK, padded_nonzero
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens

EPSILON = 1e-6  # the official code's: shorter steps from frame to frame count as none


@register("v-cast", paper="arXiv:2603.27650", needs=Needs(video=True))
@dataclass(frozen=True)
class VCast(Method):
    """Keep more tokens of the frames where the video turns: those unlike their frame's mean, or with a large norm.

    The curvature at a frame is one minus the cosine of the steps to it and from it, between means of frames. Each frame
    keeps one token, even where the budget is smaller.

    Args:
        keep: tokens per video, or a share of them (the paper: 0.25).
        temperature: of the softmax over the frames' curvatures; a smaller one gives more to the sharpest turns.

    Cost: O(N·D) time, O(N·log n) to sort frames of n tokens; O(N) extra memory.
    Paper: "V-CAST: Video Curvature-Aware Spatio-Temporal Pruning for Efficient Video Large Language Models", 2026.
    Official code: computes in the precision of the model, keeps videos of one frame whole, and its choice among equal
    tokens is not defined. Here numbers are float32, one frame is reduced like others, and of equal tokens the first
    stays. The tokens left after rounding down go to the frame with the largest remainder until it is full, as there.
    """

    keep: Budget = 0.25
    temperature: float = 0.7
    proportions: ClassVar = ("temperature",)

    def reduce(self, image: ConnectorTokens) -> Reduction:
        frames = image.in_frames(image.features)
        number, size = frames.shape[1:3]
        means = normalize(frames.mean(2, dtype=torch.float32), dim=-1, eps=EPSILON)
        steps = means.diff(dim=1)
        turns = 1 - cosine_similarity(steps[:, :-1], steps[:, 1:], dim=-1, eps=EPSILON)
        curvature = pad(turns, (1, 1), value=1.0)[:, :number]  # [B, T]: 1 at both ends
        budget = max(image.budget, number)
        if budget > image.budget:
            image = image.noted(f"each frame keeps a token: {budget} tokens, more than the budget")
        weight = (curvature / max(self.temperature, EPSILON)).softmax(-1)
        quota = 1 + fill(weight / weight.sum(-1, keepdim=True), budget - number, size - 1)
        scores = distinctness(frames, means)
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # 0: the best token of its frame
        kept, _ = padded_nonzero((rank < quota[..., None]).flatten(1))  # all videos keep the same number
        return image.keep(kept, scores.flatten(1))


def fill(weight: Tensor, tokens: int, room: int) -> Tensor:
    """Share ``tokens`` out over frames by ``weight`` `[B, T]`, at most ``room`` each, `[B, T]`."""
    exact = weight * tokens
    shares = exact.floor().clamp(max=room)
    spare, remainder = room - shares, exact - exact.floor()
    order = remainder.argsort(dim=-1, descending=True, stable=True)
    in_order = spare.gather(-1, order)
    # frames are filled one after the other: each gets what the spare places before it leave
    remaining = tokens - shares.sum(-1, keepdim=True) - (in_order.cumsum(-1) - in_order)
    return shares.scatter_add(-1, order, remaining.clamp(min=0).minimum(in_order)).long()


def distinctness(frames: Tensor, means: Tensor) -> Tensor:
    """Add each token's cosine distance to its frame's mean and its norm scaled to [0, 1] in the frame, `[B, T, n]`."""
    step = max(1, CHUNK // frames.shape[2])  # frames at once
    distances, norms = [], []
    for chunk, middle in zip(torch.split(frames, step, dim=1), torch.split(means, step, dim=1), strict=True):
        rows = chunk.float()
        distances.append(1 - cosine_similarity(rows, middle[:, :, None], dim=-1, eps=EPSILON))
        norms.append(rows.norm(dim=-1))
    norm = torch.cat(norms, 1)
    low, high = norm.amin(-1, keepdim=True), norm.amax(-1, keepdim=True)
    return torch.cat(distances, 1) + (norm - low) / (high - low + EPSILON)
