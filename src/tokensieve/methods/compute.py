"""The base of methods that keep every token, and save work on the visual rows inside the layers of the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tokensieve.errors import Refusal
from tokensieve.methods.stages import DecoderMethod, number_layers
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens


@dataclass(frozen=True)
class ComputeMethod(DecoderMethod):
    """Base of compute policies: no token leaves, and the layers of the LLM do less for visual rows in a prefill.

    Args:
        window: visual rows of one grid attend to each other within this many rows and columns of the grid, an odd
            number; ``None``: as the model's mask lets them.
        heads: a file of the heads in which visual values count; ``None``: in all.
        cut: from this layer on, visual values count in no head; a float is a share of the depth; ``None``: no layer.
        mlp: the share of each MLP's neurons that visual rows pass, from the first on.
    """

    window: int | None = None
    heads: str | None = None
    cut: int | float | None = None
    mlp: float = 1.0

    proportions: ClassVar[tuple[str, ...]] = ("mlp",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and (self.window < 1 or self.window % 2 == 0):
            raise Refusal(f"window must be an odd number of rows, at least 1, or None; got {self.window}")

    def layer_numbers(self, depth: int) -> list[int]:
        return [0]  # the engine records the tokens from there on

    def stage_budgets(self, total: int, layers: Sequence[int], depth: int) -> list[int]:
        return [total]

    def first_cut(self, depth: int) -> int:
        """Return the first of ``depth`` layers without visual values; ``depth`` if there is none.

        Raises:
            Refusal: if the LLM has no such layer.
        """
        if self.cut is None:
            return depth
        layer = number_layers([self.cut], depth, first=0)[0]
        if not 0 <= self.cut < (depth if isinstance(self.cut, int) else 1) or layer >= depth:
            raise Refusal(f"{self}: cut must be one of layers 0 to {depth - 1} of this LLM, or a share; got {self.cut}")
        return layer

    def reduce(self, image: DecoderTokens) -> Reduction:
        batch, total, _ = image.features.shape
        return Reduction.identity(total, batch, image.features.device, grid=image.grid)

    def __call__(self, image: DecoderTokens) -> Reduction:
        """Keep all tokens, without the note that a budget covers them."""
        return self.reduce(image)
