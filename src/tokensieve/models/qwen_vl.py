"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed patches of any size, a 2x2 merger, M-RoPE (Qwen3-VL: and deepstack)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tokensieve.errors import Refusal
from tokensieve.methods.base import Stage
from tokensieve.models.family import EncodeCall, Family, Modality, scatter_to_anchors
from tokensieve.models.layout import Grid, TokenLayout, to_device
from tokensieve.models.qwen_subset import subset, token_pixels, windows
from tokensieve.reduction import Reduction


class QwenVL(Family):
    name = "qwen-vl"
    title = "Qwen2-VL, Qwen2.5-VL, Qwen3-VL"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    stages: ClassVar[tuple[Stage, ...]] = ("encoder", "connector", "decoder")
    modalities: ClassVar[tuple[Modality, ...]] = ("image", "video")
    takes_subsets: ClassVar[bool] = True

    def attentions(self, tower: Any) -> list[nn.Module]:
        layers = getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
        return [tower.blocks[layer].attn for layer in layers]

    def layouts(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        side = self.merge(model)
        grids = [(t, h // side, w // side) for t, h, w in call.encoder_inputs["grid_thw"].tolist()]
        if call.modality == "video":
            return [TokenLayout.frames_of(*grid) for grid in grids]
        return [TokenLayout.grid_of(t * h, w) for t, h, w in grids]

    def pixels_per_image(self, call: EncodeCall, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        packed, tokens = self.pixels(call), [len(rows) for rows in call.output.pooler_output]
        patches_per_token = len(packed) // sum(tokens)
        return list(torch.split(packed, [patches_per_token * n for n in tokens]))

    def to_units(self, model: Any, call: EncodeCall, reads: Sequence[Tensor]) -> Tensor:
        rows = torch.cat([read.flatten(0, 1) for read in reads])
        # the processor packs the patches of a unit next to each other
        return self._in_order(model, call, rows.view(-1, self.merge(model) ** 2, *rows.shape[1:]).mean(1))

    def projector(self, model: Any) -> nn.Module:
        tower: Any = self.tower(model)
        merger: nn.Module = tower.merger
        return merger

    def merge(self, model: Any) -> int:
        tower: Any = self.tower(model)
        side: int = tower.config.spatial_merge_size
        return side

    def patches(self, model: Any, call: EncodeCall, rows: Tensor) -> Tensor:
        return self._in_order(model, call, rows.view(-1, self.merge(model) ** 2 * rows.shape[-1]))

    def project(self, model: Any, rows: Tensor) -> Tensor:
        merged: Tensor = self.projector(model)(rows.view(len(rows) * self.merge(model) ** 2, -1))
        return merged

    def _in_order(self, model: Any, call: EncodeCall, units: Tensor) -> Tensor:
        """Reorder units `[U, ...]` from the encoder's running order to token order."""
        tower: Any = self.tower(model)
        if not hasattr(tower, "fullatt_block_indexes"):
            return units
        window = call.encoder_inputs.get("window_index")  # of the kept units, if some were dropped before the encoder
        if window is None:
            window, _ = windows(tower, call.encoder_inputs["grid_thw"].cpu())
        return units[to_device(window.argsort(), units.device)]  # argsort inverts a permutation

    def resize(self, tower: Any, inputs: dict[str, Any], cells: Sequence[Grid]) -> dict[str, Any]:
        config, grids = tower.config, inputs["grid_thw"]
        if bool((grids[:, 0] > 1).any()):
            raise Refusal("only images can be resized; videos are not supported")
        merge, patches = config.spatial_merge_size, torch.split(inputs["hidden_states"], grids.prod(-1).tolist())
        resized = [
            _pack(_resized(_unpack(image, thw, config), (h * merge, w * merge), config), config)
            for image, thw, (h, w) in zip(patches, grids.tolist(), cells, strict=True)
        ]
        thw = torch.tensor([[1, h * merge, w * merge] for h, w in cells], device=grids.device, dtype=grids.dtype)
        return {**inputs, "hidden_states": torch.cat(resized), "grid_thw": thw}

    def token_pixels(self, model: Any, call: EncodeCall, method: str) -> list[Tensor]:
        grids = call.encoder_inputs["grid_thw"].tolist()
        if call.modality == "video" or any(frames > 1 for frames, _, _ in grids):
            raise Refusal(f"{method} compares the pixels of images; videos are not supported")
        return token_pixels(self.pixels(call), grids, self.tower(model).config)

    def subset(self, tower: Any, inputs: dict[str, Any], reductions: Sequence[Reduction]) -> dict[str, Any]:
        return subset(tower, inputs, reductions)

    def restore(self, tower: Any, output: Any, reductions: Sequence[Reduction]) -> None:
        def restored(rows: Tensor) -> Tensor:
            parts = torch.split(rows, [r.slots for r in reductions])
            return torch.cat([scatter_to_anchors(part, r) for part, r in zip(parts, reductions, strict=True)])

        output.pooler_output = restored(output.pooler_output)
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [restored(level) for level in output.deepstack_features]


def _unpack(patches: Tensor, thw: Sequence[int], config: Any) -> Tensor:
    """Convert packed patches `[h·w, C·T·P·P]` of one image to pixels `[T, C, h·P, w·P]` (T repeated frames)."""
    (_, h, w), m, p, frames = thw, config.spatial_merge_size, config.patch_size, config.temporal_patch_size
    x = patches.view(h // m, w // m, m, m, config.in_channels, frames, p, p)
    # (unit row, unit column, row in unit, column in unit, C, T, pixel row, pixel column) to (T, C, rows, columns)
    return x.permute(5, 4, 0, 2, 6, 1, 3, 7).reshape(frames, config.in_channels, h * p, w * p)


def _resized(pixels: Tensor, patches: Grid, config: Any) -> Tensor:
    """Resize pixels `[T, C, ·, ·]` to a grid of (height, width) ``patches``."""
    size = (patches[0] * config.patch_size, patches[1] * config.patch_size)
    return interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)


def _pack(pixels: Tensor, config: Any) -> Tensor:
    """Invert :func:`_unpack`: pixels `[T, C, h·P, w·P]` to packed patches `[h·w, C·T·P·P]`."""
    m, p = config.spatial_merge_size, config.patch_size
    frames, channels, height, width = pixels.shape
    x = pixels.view(frames, channels, height // p // m, m, p, width // p // m, m, p)
    return x.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape((height // p) * (width // p), -1)
