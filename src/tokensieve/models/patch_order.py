"""Discover which visual token each row of an unknown vision encoder becomes part of.

A vision encoder's rows are patches in some order, and a projector makes one visual token of each square of patches.
The orders in use are few (``RULES``). Which one a model uses is measured: some rows of the last layer's output are
disturbed, and only tokens that a rule predicts may change, nearly all of them. No rule fits: the model is refused.
Rows that are no patch, such as [CLS] and padding, stand before or behind the patches of each image.
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

RULES = ("in order", "raster", "in windows", "in order, then others", "raster, then others", "listed")
"""Squares one after another; rows of the whole image; squares one after another, grouped by window of attention; the
first two with the rows that are no patch at the end; as the processor lists the patches of each token."""
SHAPES = ("spatial_shapes", "target_sizes")
"""Arguments that hold (height, width) of each image in patches."""
DISTURBED = 8
"""Rows that are disturbed at once, at most."""
LEAST_ROWS, MOST_ROWS = 32, 128
"""Rows that are disturbed in all; the most, where rules remain that differ."""
SHOWN = 0.75
"""The least share of the predicted tokens that must change: one that attends to its patches may pass over some."""


def discover_rules(
    model: Any, tower: Any, call: EncodeCall, rows: int, sizes: Sequence[int], among: Sequence[str] = RULES
) -> tuple[str, ...]:
    """Return the rules that predict which tokens change when rows of the encoder change; they agree on these images.

    Args:
        rows: number of rows of the encoder, over all images of the call.
        sizes: number of visual tokens of each image.
        among: the rules to try.

    Raises:
        Refusal: if there is none, or if those that are left cannot be told apart.
    """
    by_rule = {rule: unit_of_row(rule, tower, call.inputs, rows, sizes) for rule in among}
    units = {rule: unit for rule, unit in by_rule.items() if unit is not None}
    count = min(DISTURBED, max(1, sum(sizes) // 3))  # few, so that the orders differ in what they predict
    predicted, seen, tested = dict.fromkeys(units, 0), 0, 0
    generator = torch.Generator().manual_seed(0)
    # the few rows of a small image in several groupings: another order may map a group on itself
    untested = torch.cat([torch.randperm(rows, generator=generator) for _ in range(1 + LEAST_ROWS // rows)])
    while units and len(untested) and tested < MOST_ROWS:
        apart = rows_apart(list(units.values()))[untested]
        if tested >= LEAST_ROWS and not bool(apart.any()):
            break
        order = (~apart).int().argsort(stable=True)  # first those that tell the rules apart
        chosen, untested = untested[order[:count]], untested[order[count:].sort().values]
        tested += len(chosen)
        changed = _tokens_changed(model, tower, call, rows, chosen).cpu()
        seen += int(changed.sum())
        for rule, unit in list(units.items()):
            tokens = unit[chosen]
            expected = torch.zeros_like(changed).index_fill(0, tokens[tokens >= 0], True)
            predicted[rule] += int(expected.sum())
            if bool((changed & ~expected).any()):
                del units[rule]
    units = {rule: unit for rule, unit in units.items() if seen and seen >= SHOWN * predicted[rule]}
    if not units or bool(rows_apart(list(units.values())).any()):
        raise Refusal(
            f"the rows of {type(tower).__name__} become visual tokens in an unknown order; use a method that reads "
            "nothing in the encoder"
        )
    return tuple(units)


def rows_apart(units: Sequence[Tensor]) -> Tensor:
    """Return the rows, `[rows]` bool, that become part of another token by one rule than by another."""
    stacked = torch.stack(list(units))
    return (stacked != stacked[0]).any(0)


def unit_of_row(rule: str, tower: Any, inputs: Mapping[str, Any], rows: int, sizes: Sequence[int]) -> Tensor | None:
    """Return the visual token of each row by a rule, `[rows]` (-1: none); ``None`` if the rule does not fit."""
    listed = inputs.get("image_token_pooling")
    if rule == "listed":
        return None if listed is None else _listed(listed.cpu(), rows, sum(sizes))
    shapes = _shapes(tower, inputs, rows, len(sizes))
    patches = sum(map(prod, shapes))
    if rule.endswith("others"):  # the rows of an image are padded to those of the largest
        others = [rows // len(sizes) - prod(shape) for shape in shapes]
    else:  # each image has as many rows before its patches
        others = [(rows - patches) // len(sizes)] * len(sizes)
    grids = inputs.get("image_grid_thw")
    whole = len(shapes) == len(sizes) and patches + sum(others) == rows and min(others) >= 0
    if not whole or (grids is not None and any(others)):
        return None
    units, first = [], 0
    for (height, width), tokens, more in zip(shapes, sizes, others, strict=True):
        unit = _unit_of_patch(rule.removesuffix(", then others"), height, width, tokens)
        if unit is None:
            return None
        parts = [torch.full((more,), -1), unit + first]
        units += parts[::-1] if rule.endswith("others") else parts
        first += tokens
    unit = torch.cat(units)
    return _by_windows(unit, tower, grids) if rule == "in windows" else unit


def _listed(patches: Tensor, rows: int, tokens: int) -> Tensor | None:
    """Return the token of each row from the rows of each token, `[tokens, rows of a token]` (-1: none)."""
    if len(patches) != tokens or int(patches.max()) >= rows:
        return None
    token = torch.arange(tokens)[:, None].expand_as(patches)
    return torch.full((rows,), -1).index_put((patches[patches >= 0],), token[patches >= 0])


def _shapes(tower: Any, inputs: Mapping[str, Any], rows: int, images: int) -> list[tuple[int, int]]:
    """Return each image's (height, width) in patches."""
    grids, places = inputs.get("image_grid_thw"), inputs.get("image_position_ids")
    if grids is not None:
        return [(t * h, w) for t, h, w in grids.tolist()]
    if places is not None:  # (x, y) of each patch, -1 on padding
        return [(y + 1, x + 1) for x, y in places.amax(1).tolist()]
    if (packed := _packed_shapes(tower, inputs, rows)) is not None:
        return packed
    named = next((inputs[name] for name in SHAPES if inputs.get(name) is not None), None)
    if named is None:  # tiles of equal size
        side = isqrt(rows // images)
        return [(side, side)] * images
    shapes = named.tolist()
    fewer = isqrt(sum(map(prod, shapes)) // rows)  # an encoder may merge squares of patches between its layers
    return [(height // max(1, fewer), width // max(1, fewer)) for height, width in shapes]


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
        # first, so that hooks that collect hidden states receive the disturbed rows
        handle = layer.register_forward_hook(disturb, prepend=True)
        try:
            after = type(base).get_image_features(base, **{**call.inputs, "return_dict": True})
        finally:
            handle.remove()
        difference = (_tokens(rows_of(after)) - before).abs().amax(-1)
        changed = difference > 1e-4 * difference.max()
        if bool(changed.any()):
            break
    return changed


def _tokens(pooled: Any) -> Tensor:
    parts = [pooled] if isinstance(pooled, Tensor) else list(pooled)
    return torch.cat([part.flatten(0, -2) for part in parts]).float()
