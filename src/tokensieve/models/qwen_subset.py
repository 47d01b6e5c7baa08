"""Qwen-VL's vision encoders on some of an image's patches: their pixels, places, sequences and windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from tokensieve.reduction import Reduction


def token_pixels(packed: Tensor, grids: Sequence[Sequence[int]], config: Any) -> list[Tensor]:
    """Return the pixels of the visual tokens of each still image, `[height, width, d]` float32.

    White is 1 and black 0, if the pixels were normalised as the model's processor does it by default.

    Args:
        packed: `[patches, C·T·P·P]`, the processor's pixels of all images.
        grids: (1, height, width) of each image in patches.
        config: of the vision encoder.
    """
    # a still image repeats its one frame T times
    frame = packed.view(len(packed), config.in_channels, config.temporal_patch_size, -1)[:, :, 0].float()
    by_clip = config.model_type.startswith("qwen2")
    mean, std = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if by_clip else (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
    frame = frame * frame.new_tensor(std).view(-1, 1) + frame.new_tensor(mean).view(-1, 1)
    side = config.spatial_merge_size
    units = frame.reshape(len(packed) // side**2, -1)  # the processor packs the patches of a unit next to each other
    sizes = [(height // side, width // side) for _, height, width in grids]
    per_image = torch.split(units, [height * width for height, width in sizes])
    return [rows.view(*size, -1) for rows, size in zip(per_image, sizes, strict=True)]


def subset(tower: Any, inputs: dict[str, Any], reductions: Sequence[Reduction]) -> dict[str, Any]:
    """Return the inputs of a vision encoder for the patches of the kept tokens, each at its own place in its image.

    The encoder computes its position tables, sequences and windows from the grids of whole images, unless it receives
    them as arguments.
    """
    config, grids, pixels = tower.config, inputs["grid_thw"], inputs["hidden_states"]
    per_unit = config.spatial_merge_size**2
    starts = [sum(r.total for r in reductions[:number]) for number in range(len(reductions))]
    units = torch.cat([r.anchors + start for r, start in zip(reductions, starts, strict=True)])
    patches = (units[:, None] * per_unit + torch.arange(per_unit, device=units.device)).flatten()
    lengths = torch.tensor([r.slots * per_unit for r in reductions], device=pixels.device)
    changed = {
        "hidden_states": pixels[patches],
        "position_ids": get_vision_position_ids(grids, config.spatial_merge_size)[patches],
        "cu_seqlens": pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
    }
    if hasattr(tower, "pos_embed"):  # Qwen3-VL adds positions that are interpolated between those of a table
        places, weights = get_vision_interpolation_indices_and_weights(
            grids,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=config.spatial_merge_size,
        )
        changed |= {"interp_indices": places[patches], "interp_weights": weights[patches]}
    if hasattr(tower, "fullatt_block_indexes"):  # Qwen2.5-VL: most layers attend inside windows
        order, ends = (x.to(units.device) for x in windows(tower, grids))
        kept = torch.zeros_like(order, dtype=torch.bool).index_fill(0, units, True)
        stays = kept[order]
        number = kept.cumsum(0) - 1  # of each kept unit among the kept ones
        kept_before = pad(stays.cumsum(0), (1, 0))  # for each place of the running order
        changed["window_index"] = number[order[stays]]
        # a window without a kept unit has length 0: it vanishes
        changed["cu_window_seqlens"] = (kept_before[ends // per_unit] * per_unit).unique_consecutive().int()
    return {**inputs, **changed}


def windows(tower: Any, grids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order in which Qwen2.5-VL runs its units, window by window, and the ends of the windows in patches."""
    config = tower.config
    order, ends = get_vision_window_index(grids, config.spatial_merge_size, config.window_size, config.patch_size)
    return order, ends
