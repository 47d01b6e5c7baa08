"""Images and prompts for the models of ``zoo.py``.

An image is drawn by the arguments of ``get_image_features`` (``DRAW``: by its type). The number of its placeholders is
the number of rows that the model makes of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.prompts import concatenated
from tests.support.zoo_sizes import BOS, END, IMAGE, PAD, START, WORDS
from tokensieve.models.planes import rows_of


def packed(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw an image of packed patches, (height, width) in units of the patches that are merged."""
    vision = model.config.vision_config
    side = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", None) or 2
    patch, channels = vision.patch_size, getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1)
    count = height * width * side * side
    pixels = torch.randn(count, channels * frames * patch * patch, generator=generator)
    grid = torch.tensor([[1, height * side, width * side]])
    return {"pixel_values": pixels, "image_grid_thw": grid}


def tiles(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw one square image of the encoder's size."""
    config = model.config
    side = getattr(getattr(config, "vision_config", config), "image_size", 128)
    side = side if isinstance(side, int) else side[0]
    return {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def as_pictures(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw packed patches that keep their pixels' axes."""
    drawn, patch = packed(model, height, width, generator), model.config.vision_config.patch_size
    return drawn | {"pixel_values": drawn["pixel_values"].unflatten(1, (3, patch, patch))}


def pixtral(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw an image of any size, in units of 2x2 patches."""
    cell = 2 * model.config.vision_config.patch_size
    size = (cell * height, cell * width)
    return {"pixel_values": torch.randn(1, 3, *size, generator=generator), "image_sizes": torch.tensor([size])}


def padded_patches(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw patches in a row that is padded to the longest image's."""
    vision, count = model.config.vision_config, 4 * height * width
    mask = (torch.arange(64) < count).long()[None]
    pixels = torch.randn(1, 64, 3 * vision.patch_size**2, generator=generator) * mask[..., None]
    shapes = torch.tensor([[2 * height, 2 * width]])
    return {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask}


def positioned_patches(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw patches with their coordinates, -1 on padding."""
    vision = model.config.vision_config
    side, total = getattr(vision, "pooling_kernel_size", 1), 64
    y, x = torch.meshgrid(torch.arange(side * height), torch.arange(side * width), indexing="ij")
    positions = torch.full((1, total, 2), -1)
    positions[0, : x.numel()] = torch.stack([x.flatten(), y.flatten()], -1)
    pixels = torch.rand(1, total, 3 * vision.patch_size**2, generator=generator)
    return {"pixel_values": pixels * (positions[..., :1] >= 0), "image_position_ids": positions}


def strip(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw patches side by side in one long picture, as MiniCPM-V packs them."""
    patch, rows, columns = model.config.vision_config.patch_size, 4 * ((height + 1) // 2), 4 * ((width + 1) // 2)
    pixels = torch.randn(1, 3, patch, rows * columns * patch, generator=generator)
    return {"pixel_values": pixels, "target_sizes": torch.tensor([[rows, columns]], dtype=torch.int32)}


def grid_only(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    patch = model.config.vision_config.patch_size
    pixels = torch.randn(4 * height * width, 3 * patch**2, generator=generator)
    return {"pixel_values": pixels, "image_grid_hw": torch.tensor([[2 * height, 2 * width]])}


def merged_pictures(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw squares of 2x2 patches as pictures, channels last."""
    side = 2 * model.config.vision_config.patch_size
    pixels = torch.randn(height * width, side, side, 3, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}


def merged_by(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    return packed(model, height, width, generator) | {"image_merge_sizes": torch.tensor([2])}


def both_resolutions(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    high = model.config.high_res_vision_config.image_size
    drawn = tiles(model, height, width, generator)
    return drawn | {"high_res_pixel_values": torch.randn(1, 3, high, high, generator=generator)}


def per_sample(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw one image of a sample, [sample, image, 3, H, W]."""
    return {"pixel_values": tiles(model, height, width, generator)["pixel_values"][None]}


def masked_tiles(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    drawn = per_sample(model, height, width, generator)
    return drawn | {"pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}


def tiled(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a base tile and two more."""
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, 3, side, side, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[side, 2 * side]])}


def pooled_patches(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw one crop, and the patches that each of its tokens averages: 2x2."""
    patch = model.config.vision_config.patch_size
    pixels = torch.randn(1, 1, 64, 3 * patch**2, generator=generator)
    index = torch.arange(64).view(4, 2, 4, 2).transpose(1, 2).reshape(16, 4)
    return {"pixel_values": pixels, "image_token_pooling": index, "image_grids": torch.tensor([[4, 4, 0, 0]])}


def flat_patches(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw 12 patches of an image, which enter the LLM after one projection."""
    return {"pixel_values": torch.randn(1, 12, 3 * model.config.patch_size**2, generator=generator)}


def patch_clips(model: Any, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw patches as clips of two frames, channels last; each is encoded by itself."""
    patch = model.config.vision_config.patch_size
    return {"pixel_values": torch.randn(height * width, 2, patch, patch, 3, generator=generator)}


DRAW: dict[str, Callable[..., dict[str, Tensor]]] = {
    "deepseek_vl_hybrid": both_resolutions,
    "fuyu": flat_patches,
    "gemma4": positioned_patches,
    "gemma4_unified": positioned_patches,
    "granite4_vision": tiled,
    "granite_docling": masked_tiles,
    "idefics2": per_sample,
    "inkling2": merged_pictures,
    "inkling_mm_model": patch_clips,
    "kimi_k25": as_pictures,
    "lfm2_vl": padded_patches,
    "lighton_ocr": pixtral,
    "minicpm_ocr": strip,
    "minicpmv4_6": strip,
    "minicpmv4_7": strip,
    "mistral_large4": pixtral,
    "molmo2": pooled_patches,
    "nemotron_h_omni": grid_only,
    "paddleocr_vl": as_pictures,
    "video_llama_3": merged_by,
}


def draw(model: Any, model_type: str, shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    arguments = inspect.signature(model.base_model.get_image_features).parameters
    drawn = DRAW.get(model_type, packed if "image_grid_thw" in arguments else tiles)
    return drawn(model, *shape, torch.Generator().manual_seed(seed))


def rows(pooled: Any) -> int:
    """Return the number of visual tokens in the output of an encode call."""
    parts = [pooled] if isinstance(pooled, Tensor) else list(pooled)
    return sum(part.numel() // part.shape[-1] for part in parts)


PROMPTS = ((3, ((3, 4),), 5), (4, ((2, 5), (4, 2)), 7), (2, ((3, 3),), 9))
"""(words before, shapes of the images, words after) of three prompts."""


def prompts(model: Any, model_type: str) -> Callable[[Sequence[int]], dict[str, Tensor]]:
    """Return a function from numbers of ``PROMPTS`` to one left-padded batch."""
    samples, forward = [], inspect.signature(type(model).forward).parameters
    placeholder = getattr(model.config, "image_token_id", IMAGE)
    for number, (before, shapes, after) in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(number)

        def words(count: int, generator: torch.Generator = generator) -> list[int]:
            return torch.randint(WORDS.start, WORDS.stop, (count,), generator=generator).tolist()

        images = [draw(model, model_type, shape, 10 * number + i) for i, shape in enumerate(shapes)]
        ids = [BOS, *words(before)]
        for image in images:
            with torch.inference_mode():
                output = model.base_model.get_image_features(**image, return_dict=True)
            ids += [START, *[placeholder] * rows(rows_of(output)), END, *words(2)]
        samples.append(([*ids, *words(after)], images))

    def batch(numbers: Sequence[int]) -> dict[str, Tensor]:
        chosen = [samples[number] for number in numbers]
        width = max(len(ids) for ids, _ in chosen)
        ids = torch.tensor([[PAD] * (width - len(ids)) + ids for ids, _ in chosen])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in chosen])
        images = [image for _, of_sample in chosen for image in of_sample]
        inputs = {name: concatenated([image[name] for image in images]) for name in images[0]}
        if "target_sizes" in inputs:  # all patches stand side by side in one row
            inputs["pixel_values"] = torch.cat([image["pixel_values"] for image in images], -1)
        if "image_token_pooling" in inputs:  # its patches are numbered over the batch: 16 tokens of 64 patches an image
            inputs["image_token_pooling"] += 64 * torch.arange(len(images)).repeat_interleave(16)[:, None]
        types = {
            name: (ids == placeholder).long() for name in ("mm_token_type_ids", "token_type_ids") if name in forward
        }
        return {"input_ids": ids, "attention_mask": mask, **inputs, **types}

    return batch
