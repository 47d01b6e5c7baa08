"""The base of methods that put learned rows, registers, behind each image in the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokensieve.errors import Refusal
from tokensieve.methods.stages import DecoderMethod
from tokensieve.methods.trained import ModelShape, TrainedMethod
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens


class Registers(nn.Module):
    """A table of learned rows `[most, D]`. Its first R rows are a set of their own, for each R.

    Args:
        most: number of rows.
    """

    def __init__(self, shape: ModelShape, most: int = 64) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(most, shape.width) * shape.width**-0.5)

    def forward(self, count: int) -> Tensor:
        """Return the first ``count`` rows, `[R, D]`.

        Raises:
            Refusal: if there are fewer.
        """
        if count > len(self.rows):
            raise Refusal(f"these weights have {len(self.rows)} registers; got keep={count}")
        return self.rows[:count]


@dataclass(frozen=True)
class RegisterMethod(TrainedMethod, DecoderMethod):
    """Base of methods whose R registers enter the LLM behind the N tokens of each image, as `[N + R, D]`.

    The budget is R, or R as a share of N. An image of no more than R tokens stays whole, without registers.
    """

    Net = Registers

    @property
    def softens(self) -> Literal["rows", "attention"]:
        """Return "rows": the image leaves in training, too, so attention needs no bias."""
        return "rows"

    def registers(self, total: int) -> int:
        """Return R for an image of which ``total`` tokens enter the LLM; 0 for an image that stays whole."""
        budget = self.image_budget(total)
        return budget if budget < total else 0

    def rows(self, net: Any, total: int, share: float = 1.0) -> Tensor:
        """Return the registers of such an image, `[R, D]`; with a ``share`` below 1, the first of them."""
        count = self.registers(total)
        rows: Tensor = net(max(1, round(count * share)) if count else 0)
        return rows

    def reduce(self, image: DecoderTokens) -> Reduction:
        """Keep the registers, which are the last ``image.budget`` rows, and drop all others."""
        last = torch.arange(image.total - image.budget, image.total, device=image.features.device)
        note = f"{image.budget} learned registers stay, and no token of the image"
        return image.noted(note).keep(last.expand(len(image.features), -1))
