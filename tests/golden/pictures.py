"""Pictures of the vectors about pixels: stored as PNG files, speckled by drawn numbers, and packed as by Qwen3-VL."""

import io

import numpy
import torch
from PIL import Image
from torch import Tensor

from tests.golden.drawn import drawn

PATCH = 16


def stored(png: Tensor) -> Tensor:
    """Read the bytes of a PNG file, `[n]` uint8, to a picture `[H, W, 3]` uint8."""
    picture = Image.open(io.BytesIO(bytes(png.tolist()))).convert("RGB")
    return torch.from_numpy(numpy.array(picture))


def speckled(picture: Tensor, seed: int, levels: int) -> Tensor:
    """Add up to ``levels`` of 256 levels to each number of a picture, or subtract them."""
    noise = (drawn(seed, *picture.shape) * (levels + 1)).trunc().int()
    return (picture.int() + noise).clamp(0, 255).to(torch.uint8)


def pixel_values(picture: Tensor) -> Tensor:
    """Normalise a picture `[H, W, 3]` to [-1, 1], and pack its patches: `[patches, 3·2·16·16]`, 2x2 side by side."""
    height, width, _ = picture.shape
    pixels = ((picture.double() / 255 - 0.5) / 0.5).float().permute(2, 0, 1)
    blocks = pixels.reshape(3, height // PATCH // 2, 2, PATCH, width // PATCH // 2, 2, PATCH)
    patches = blocks.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3, 1, PATCH, PATCH)
    return patches.expand(-1, -1, 2, -1, -1).reshape(len(patches), -1)
