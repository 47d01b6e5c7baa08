"""Discover which visual token each row of an unknown vision encoder becomes part of.

A vision encoder's rows are patches in some order, and a projector makes one visual token of each square of patches.
The orders in use are few (``RULES``). Which one a model uses is measured: some rows of the last layer's output are
disturbed, and exactly the tokens that a rule predicts must change. No rule predicts them: the model is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from tokensieve.errors import Refusal
from tokensieve.models.family import EncodeCall, layer_list
from tokensieve.models.planes import rows_of

RULES = ("in order", "raster", "in windows")
"""Squares one after another; rows of the whole image; squares one after another, grouped by window of attention."""
DRAWS, DISTURBED = 2, 8


def discover_rule(model: Any, tower: Any, call: EncodeCall, rows: int, sizes: Sequence[int]) -> str:
    """Return the rule that predicts which tokens change when rows of the encoder change.

    Args:
        rows: number of rows of the encoder, over all images of the call.
        sizes: number of visual tokens of each image.

    Raises:
        Refusal: if there is none.
    """
    rules = {rule: unit_of_row(rule, tower, call.inputs, rows, sizes) for rule in RULES}
    for draw in range(DRAWS):
        chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(draw))[:DISTURBED]
        changed = _tokens_changed(model, tower, call, rows, chosen)
        rules = {rule: unit for rule, unit in rules.items() if unit is not None and _predicts(unit, chosen, changed)}
    if not rules:
        raise Refusal(
            f"the rows of {type(tower).__name__} become visual tokens in an unknown order; use a method that reads "
            "nothing in the encoder"
        )
    return next(iter(rules))


def unit_of_row(rule: str, tower: Any, inputs: Mapping[str, Any], rows: int, sizes: Sequence[int]) -> Tensor | None:
    """Return the visual token of each row by a rule, `[rows]` (-1: none); ``None`` if the rule does not fit."""
    grids = inputs.get("image_grid_thw")
    if grids is not None:
        shapes = [(t * h, w) for t, h, w in grids.tolist()]
    elif (packed := _packed_shapes(tower, inputs, rows)) is not None:
        shapes = packed
    else:  # tiles of equal size; rows that are no patch, such as [CLS], come first
        side = isqrt(rows // len(sizes))
        shapes = [(side, side)] * len(sizes)
    patches = sum(map(prod, shapes))
    specials = (rows - patches) // len(sizes)
    if len(shapes) != len(sizes) or patches + specials * len(sizes) != rows or (grids is not None and specials):
        return None
    units, first = [], 0
    for (height, width), tokens in zip(shapes, sizes, strict=True):
        unit = _unit_of_patch(rule, height, width, tokens)
        if unit is None:
            return None
        units += [torch.full((specials,), -1), unit + first]
        first += tokens
    unit = torch.cat(units)
    return _by_windows(unit, tower, grids) if rule == "in windows" else unit


def _packed_shapes(tower: Any, inputs: Mapping[str, Any], rows: int) -> list[tuple[int, int]] | None:
    """Return each image's (height, width) in patches if images of any size stand one after another, as in Pixtral."""
    sizes, patch = inputs.get("image_sizes"), getattr(tower.config, "patch_size", None)
    if sizes is None or not isinstance(patch, int):
        return None
    shapes = [(height // patch, width // patch) for height, width in torch.as_tensor(sizes).tolist()]
    # in models with tiles, these are the sizes of the whole images
    return shapes if sum(map(prod, shapes)) == rows else None


def _unit_of_patch(rule: str, height: int, width: int, tokens: int) -> Tensor | None:
    """Return the token of each patch of one image, `[height · width]`."""
    patch, each = torch.arange(height * width), height * width // tokens
    if each * tokens != height * width:
        return None
    if rule != "raster":
        return patch // each
    side = isqrt(each)
    if side * side != each or height % side or width % side:
        return None
    return (patch // width // side) * (width // side) + patch % width // side


def _by_windows(unit: Tensor, tower: Any, grids: Tensor | None) -> Tensor | None:
    config = tower.config
    names = ("spatial_merge_size", "window_size", "patch_size")
    if grids is None or not all(isinstance(getattr(config, name, None), int) for name in names):
        return None
    # the encoder permutes squares of patches so that each window is contiguous
    window, _ = get_vision_window_index(grids.cpu(), *(getattr(config, name) for name in names))
    each = config.spatial_merge_size**2
    return unit.view(-1, each)[window].flatten() if len(window) * each == len(unit) else None


def _predicts(unit: Tensor, chosen: Tensor, changed: Tensor) -> bool:
    tokens = unit[chosen]
    predicted = torch.zeros_like(changed).index_fill(0, tokens[tokens >= 0].to(changed.device), True)
    return bool(changed.any()) and torch.equal(predicted, changed)


@torch.no_grad()
def _tokens_changed(model: Any, tower: Any, call: EncodeCall, rows: int, chosen: Tensor) -> Tensor:
    """Encode again with some rows disturbed; returns `[N]` bool, True on visual tokens that changed."""

    def disturb(layer: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[:-1].numel() != rows:
            return None
        flat = hidden.flatten(0, -2).clone()
        index = chosen.to(flat.device)
        flat[index] = -2 * flat[index].roll(1, -1)  # another direction, so that a norm does not undo it
        disturbed = flat.view_as(hidden)
        return (disturbed, *output[1:]) if isinstance(output, tuple) else disturbed

    base, before = model.base_model, _tokens(rows_of(call.output))
    changed = torch.zeros(len(before), dtype=torch.bool, device=before.device)
    for layer in reversed(layer_list(tower)[-3:]):  # a model may take its features before the last layer
        handle = layer.register_forward_hook(disturb)
        try:
            after = type(base).get_image_features(base, **{**call.inputs, "return_dict": True})
        finally:
            handle.remove()
        difference = (_tokens(rows_of(after)) - before).abs().amax(-1)
        changed = difference > 1e-3 * difference.max()
        if bool(changed.any()):
            break
    return changed


def _tokens(pooled: Any) -> Tensor:
    parts = [pooled] if isinstance(pooled, Tensor) else list(pooled)
    return torch.cat([part.flatten(0, -2) for part in parts]).float()
