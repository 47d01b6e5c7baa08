"""Before the vision encoder: its inputs become smaller images, or the patches of the tokens that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.methods import PixelMethod, ResizeMethod
from tokensieve.models import EncodeCall, Family
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


def reduce_before(
    family: Family, model: Any, tower: nn.Module, call: EncodeCall, method: ResizeMethod | PixelMethod
) -> list[Reduction]:
    """Return the decision about each image of an encode call, and replace the encoder's inputs in ``call`` by it."""
    if isinstance(method, PixelMethod):
        cells = family.token_pixels(model, call, str(method))
        decisions = [
            method(VisualTokens(image.flatten(0, 1)[None], grid=(image.shape[0], image.shape[1])))[0] for image in cells
        ]
        if not all(decision.whole for decision in decisions):
            call.encoder_inputs = family.subset(tower, call.encoder_inputs, decisions)
        return decisions
    device = next(value.device for value in call.encoder_inputs.values() if isinstance(value, Tensor))
    grids = [layout.grid or (1, layout.total) for layout in family.layouts(model, call)]
    decisions, sizes = [], []
    for height, width in grids:
        budget = method.image_budget(height * width) or height * width
        no_features = torch.empty(1, height * width, 0, device=device)
        decision = method(VisualTokens(no_features, grid=(height, width), budget=budget))[0]
        decisions.append(decision)
        sizes.append((height, width) if decision.whole else method.cells((height, width), budget))
    if not all(decision.whole for decision in decisions):
        call.encoder_inputs = family.resize(tower, call.encoder_inputs, sizes)
    return decisions
