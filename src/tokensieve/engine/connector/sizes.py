"""The sizes of the tokens that enter the LLM, and the bias that repairs attention to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokensieve.engine.handoff import ImageReduction
from tokensieve.engine.sizes import carried_sizes, key_bias, uniform_sizes
from tokensieve.methods import Repair
from tokensieve.models import TokenLayout
from tokensieve.reduction import Reduction


def sized(images: Sequence[ImageReduction], features: Sequence[Tensor] | None = None) -> list[ImageReduction]:
    """Return the images with the sizes that follow from their first decisions.

    Args:
        features: per image `[N, D]`, the rows that were decided about; ``None``: decisions inside the vision encoder,
            whose dropped tokens are not counted.
    """
    all_rows = [None] * len(images) if features is None else features
    return [
        replace(image, sizes=carried_sizes(ones(image.decision), image.decision, rows, image.layout.separator))
        for image, rows in zip(images, all_rows, strict=True)
    ]


def ones(decision: Reduction) -> Tensor:
    """Return the sizes of an image's original tokens, `[N]`."""
    return torch.ones(decision.total, device=decision.anchors.device)


def sizes_after(
    images: Sequence[ImageReduction],
    decisions: Sequence[Reduction],
    features: Sequence[Tensor],
    layouts: Sequence[TokenLayout],
) -> list[Tensor | None]:
    """Return per image the sizes after a decision about the rows that it had left; ``None`` where not requested.

    Args:
        features: per image `[N, D]`, the rows that the vision encoder made.
        layouts: of the rows that were left.
    """
    return [
        image.sizes
        if image.sizes is None
        else carried_sizes(image.sizes, decision, image.features.apply(rows), layout.separator)
        for image, decision, rows, layout in zip(images, decisions, features, layouts, strict=True)
    ]


def bias_of(visual: Tensor, images: Sequence[ImageReduction], repair: Repair) -> Tensor:
    """Return the bias of each column, `[1, B, n]`; with "restore" `[2, B, n]`, uniform in the LLM's first layer.

    Args:
        visual: `[B, n]` bool, True on visual tokens.
    """
    sizes = [image.sizes for image in images if image.sizes is not None]
    biases = [key_bias(visual, sizes)]
    if repair == "restore":
        separators = [image.remaining.separator for image in images]
        biases.insert(0, key_bias(visual, list(map(uniform_sizes, sizes, separators))))
    return torch.stack(biases)
