"""VidCom2: keep the tokens that differ most from their frame and their video, and more of the unusual frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget, count
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import CHUNK, normalise, padded_nonzero
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens

BANDWIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the Gaussians that are summed


@register("vidcom2", paper="arXiv:2505.14454", needs=Needs(video=True))
@dataclass(frozen=True)
class VidCom2(Method):
    """Keep the tokens of each frame that are least like the mean of the frame and of the video.

    Frames that are unlike the video keep a larger share. At least one token of each frame is counted, even where the
    budget is smaller. Likeness is measured in the channels of lowest variance.

    Args:
        keep: tokens per video, or a share of them, rounded down (the paper: 0.25 and 0.15).
        exact: make the frames add up to the budget, by likeness, as vLLM does; ``False`` leaves each frame its rounded
            share, as the official code does, so that the number of tokens depends on the video.
        channels: the share of channels that is read.
        temperature: of the softmax over frames; a smaller one gives more to the most unusual frames.

    Cost: O(N·D) time, O(N·log N) to sort; a float32 copy of the channels that are read.
    Paper: "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models", EMNLP
    2025.
    Official code: computes in the precision of the model, and its choice among equal tokens is not defined. Here
    numbers are float32, and of equal tokens the first stays. From float32 tokens the decision is that of the official
    code with ``exact=False``, and that of vLLM 0.32 with its pruning rate 1 − ``keep``.
    """

    keep: Budget = 0.25
    exact: bool = True
    channels: float = 0.5
    temperature: float = 0.01
    proportions: ClassVar = ("channels", "temperature")

    def stage_budgets(self, total: int, layers: Sequence[int], depth: int) -> list[int] | None:
        # rounded down, as by vLLM: the share also sets how many tokens a frame has
        return [count(self.keep if isinstance(self.keep, int) else max(1, int(self.keep * total)), total)]

    def slots(self, budget: int, grid: tuple[int, int] | None) -> int | None:
        return super().slots(budget, grid) if self.exact else None

    def reduce(self, image: ConnectorTokens) -> Reduction:
        width = max(1, int(image.features.shape[-1] * self.channels))
        quiet = image.features.float().var(1, unbiased=False).topk(width, largest=False).indices  # [B, C]
        pairs = zip(image.features, quiet, strict=True)
        frames = image.in_frames(normalise(torch.stack([rows[:, channels] for rows, channels in pairs])))
        number, size = frames.shape[1:3]
        to_video = likeness(frames, frames.mean((1, 2), keepdim=True))  # [B, T, n]
        similarity = to_video + likeness(frames, frames.mean(2, keepdim=True))
        unusual = -to_video.mean(-1)
        weight = ((unusual - unusual.amax(-1, keepdim=True)) / max(self.temperature, 1e-6)).softmax(-1)
        share = self.keep if isinstance(self.keep, float) else image.budget / image.total
        rate = (share * (1 + weight - weight.mean(-1, keepdim=True))).clamp(max=1)
        quota = (rate * size).round().long().clamp(1, size)  # [B, T]
        rank = similarity.argsort(dim=-1, stable=True).argsort(-1)  # 0: the least similar token of its frame
        chosen, scores = (rank < quota[..., None]).flatten(1), -similarity.flatten(1)
        if not self.exact:
            kept, valid = padded_nonzero(chosen)
            note = "each frame keeps its rounded share: together they can be more than the budget"
            return image.noted(note).keep(kept, scores, valid=valid)
        budget = max(image.budget, number)
        if budget > image.budget:
            image = image.noted(f"one token of each frame is counted: {budget} tokens, more than the budget")
        order = scores.argsort(dim=-1, descending=True, stable=True)
        # the chosen tokens come first, and the others fill the budget, both by score
        order = order.gather(-1, (~chosen).gather(-1, order).int().argsort(dim=-1, stable=True))
        return image.keep(order[:, :budget], scores)


def likeness(frames: Tensor, centre: Tensor) -> Tensor:
    """Sum Gaussians of the distance of each unit row `[B, T, n, C]` to a centre `[B, T or 1, 1, C]`, `[B, T, n]`."""
    step = max(1, CHUNK // frames.shape[2])  # frames at once
    chunks = zip(torch.split(frames, step, dim=1), torch.split(centre.expand_as(frames), step, dim=1), strict=True)
    square = torch.cat([(chunk - middle).square().sum(-1) for chunk, middle in chunks], 1)
    return torch.stack([(-square / (2 * bandwidth)).exp() for bandwidth in BANDWIDTHS]).sum(0)
