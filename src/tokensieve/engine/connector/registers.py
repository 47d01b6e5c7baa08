"""Registers: learned rows that enter the LLM behind the tokens of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokensieve.engine.handoff import ImageReduction
from tokensieve.engine.prompt.placeholders import ColumnSelection, Placeholders
from tokensieve.errors import Refusal
from tokensieve.methods.registers import RegisterMethod
from tokensieve.models.layout import to_device


@dataclass(frozen=True, eq=False)
class RegisterRows:
    """Makes the registers of images; ``net`` is the net of the ``method``."""

    method: RegisterMethod
    net: Any

    def behind(self, images: Sequence[ImageReduction], devices: Sequence[torch.device]) -> list[ImageReduction]:
        """Return the images with registers behind their tokens; a training step draws one share of the registers.

        Raises:
            Refusal: for a video, or if the net has too few rows.
        """
        if any(image.layout.video for image in images):
            raise Refusal(f"{self.method} puts registers behind images; videos are not supported")
        # between 1/16 and all, evenly on a log scale: small sets are trained as often as large ones
        share = 2 ** (-4 * float(torch.rand(()))) if self.net.training else 1.0
        added = []
        for image, device in zip(images, devices, strict=True):
            rows = self.method.rows(self.net.to(device), image.entered, share)
            added.append(image.with_registers(rows) if len(rows) else image)
        return added


def select_with_registers(
    stay: Tensor,
    placeholders: Placeholders,
    images: Sequence[Sequence[ImageReduction]],
    positions: Tensor,
    lengths: list[int],
) -> tuple[ColumnSelection, Tensor]:
    """Return the columns of the prompts with those of the registers, and their position ids `[…, B, n]`.

    An image's last placeholder is repeated for each of its registers. These have the position ids that follow the
    image's, and all later columns move back by their number.

    Args:
        stay: `[B, L]` bool, the columns that stay.
        images: `[row][image]`.
        positions: position ids of the whole prompt, `[B, L]` or `[axes, B, L]`.
        lengths: per row, the number of new columns.
    """
    added = torch.zeros(stay.shape, dtype=torch.long)
    for row, (of_row, spans) in enumerate(zip(images, placeholders.spans(), strict=True)):
        for image, (_, last) in zip(of_row, spans, strict=True):
            added[row, last] = image.decision.added
    added = to_device(added, stay.device)
    columns, number = ColumnSelection.repeating(stay.long() + added, lengths)
    number = number - columns.take(stay.long())  # of the register; −1 on columns that stay
    before = columns.take(added.cumsum(-1) - added)  # registers of the images before
    following = columns.take(_last_position(positions)) + 1 + number
    return columns, before + columns.take(positions).where(number < 0, following)


def _last_position(positions: Tensor) -> Tensor:
    """Return for each column the largest of its position ids, on all axes; the plain ids of M-RoPE stay apart."""
    if positions.ndim == 2:
        return positions
    plain, axes = positions[:-3], positions[-3:]
    return torch.cat([plain, axes.amax(0, keepdim=True).expand_as(axes)])
