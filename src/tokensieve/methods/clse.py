"""CLSE: rank the visual tokens by the growth of their high spatial frequencies in the first layer, and by attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import DecoderMethod, DecoderNeeds, ScoreMethod, register
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens, given

NEEDS = DecoderNeeds(attention="last", input_embeddings=True, grid=True)
NO_GRID = "the tokens form no whole grid: ranked by attention alone"


@register("clse", paper="arXiv:2606.24165", stage="decoder", needs=NEEDS)
@dataclass(frozen=True)
class Clse(ScoreMethod, DecoderMethod):
    """Keep the tokens that change most in their high spatial frequencies, times the attention of the last token.

    While the tokens form the whole grid, the score is ``attention * sigmoid(z / temperature)``. z is the change of the
    high-frequency part from the LLM's input to the layer, standardised over the image. Once tokens have left, and for
    an image without a grid, the attention alone ranks. The frames of a video are filtered one by one.

    Args:
        keep: tokens per image after the last of ``layers``, or a share of those that entered the LLM. The numbers after
            the layers before it are spaced geometrically.
        average: instead of ``keep``, tokens averaged over all layers.
        counts: instead of ``keep``, tokens after each of ``layers`` (official for 192, 128, 64 of 576: (330, 210, 62),
            (220, 140, 41), (110, 70, 20)).
        layers: tokens leave before these layers; floats are shares of the depth (official: 1, 11 and 21 of 32).
        cutoff: width of the filter that removes low frequencies, as a share of half the shorter side.
        temperature: of the sigmoid.

    Cost: O(N·D·log N) time and O(N·D) extra memory for two Fourier transforms, and per layer of ``layers`` one row of
    attention over the L positions, O(L·D).
    Paper: "Spectral Evolution-Guided Token Pruning in Multimodal Large Language Models", ECCV 2026.
    Official code: this follows the port in the repository of PriorTR. Its 192, 128 and 64 leave the
    first layer out: over all 32 layers they are 208, 145 and 81 tokens on average. The port knows grids of 24 x 24 for
    LLaVA, and rounds its layers differently for an LLM of 28 or 36 layers.
    """

    keep: Budget = 0.1
    average: Budget | None = None
    counts: tuple[Budget, ...] | None = None
    layers: tuple[int | float, ...] = (0.03125, 0.34375, 0.65625)
    cutoff: float = 0.1
    temperature: float = 0.1
    proportions: ClassVar = ("cutoff",)

    def reduce(self, image: DecoderTokens) -> Reduction:
        lost_nothing = image.total == (image.entered or image.total)
        return super().reduce(image.noted(NO_GRID) if image.grid is None and lost_nothing else image)

    def score(self, image: DecoderTokens) -> Tensor:
        attention = given(image.attention).mean((1, 2))  # over the heads; the one query is the last prompt token
        if image.grid is None:
            return attention
        frames, (height, width) = image.frames or 1, image.grid
        shape = (len(attention), frames, height // frames, width, -1)  # the frames are stacked vertically
        first, later = (
            high_frequencies(rows.float().reshape(shape), self.cutoff).flatten(1)
            for rows in (given(image.input_embeddings), image.features)
        )
        change = ((later - first).abs() / (first.mean(-1, keepdim=True) + first + 1e-6)).clamp(max=1)
        z = (change - change.mean(-1, keepdim=True)) / (change.std(-1, keepdim=True) + 1e-6)
        return attention * (z / self.temperature).sigmoid()


def high_frequencies(rows: Tensor, cutoff: float) -> Tensor:
    """Return the size of the high-frequency part of each row, mean over channels, `[..., h, w, D]` to `[..., h, w]`."""
    height, width = rows.shape[-3:-1]
    vertical, horizontal = (torch.fft.fftfreq(n, 1 / n, device=rows.device) for n in (height, width))
    squares = vertical[:, None].square() + horizontal.square()  # [h, w], in waves per side
    sigma = max(min(height // 2, width // 2) * cutoff, 1e-6)
    passed = 1 - (-squares / (2 * sigma**2)).exp()
    spectrum = torch.fft.fft2(rows, dim=(-3, -2)) * passed[..., None]
    sizes: Tensor = torch.fft.ifft2(spectrum, dim=(-3, -2)).abs()
    return sizes.mean(-1)
