"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed patches, a 2x2 merger, M-RoPE (Qwen3-VL: and deepstack)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokensieve.vllm.families.base import ServedFamily, torch_split

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tokensieve.models import TokenLayout


class QwenVL(ServedFamily):
    mrope = True

    def pooled(self, config: Mapping[str, Any]) -> bool:
        return False

    def depth(self, config: Mapping[str, Any]) -> int:
        return int(config["vision_config"]["depth"])

    def size(self, config: Any, item: Mapping[str, Any]) -> tuple[int, ...]:
        _, height, width = item["image_grid_thw"].tolist()
        return height, width

    def layout(self, config: Any, size: Sequence[int]) -> TokenLayout:
        from tokensieve.models import TokenLayout

        side = config.vision_config.spatial_merge_size
        return TokenLayout.grid_of(size[0] // side, size[1] // side)

    def has_cls(self, config: Any) -> bool:
        return False

    def attentions(self, model: Any) -> list[nn.Module]:
        return [block.attn.attn for block in model.visual.blocks]

    def segments(self, model: Any, layouts: Sequence[TokenLayout]) -> list[int]:
        return [layout.patches * self.patches_per_token(model) for layout in layouts]

    def units(self, model: Any, rows: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        # the processor packs the patches of a token next to each other
        rows = rows.flatten(0, 1)
        units = rows.view(-1, self.patches_per_token(model), *rows.shape[1:]).mean(1)
        return self.in_order(model, units, layouts)

    def projector(self, model: Any) -> nn.Module:
        # vLLM can call a compiled merger past its hooks; the merger's first step receives the same rows
        merger = model.visual.merger
        first: nn.Module = merger.norm if hasattr(merger, "norm") else merger.ln_q
        return first

    def patches(self, model: Any, rows: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        units = rows.reshape(-1, self.patches_per_token(model) * rows.shape[-1])
        return self.in_order(model, units, layouts)

    def project(self, model: Any, rows: Tensor) -> Tensor:
        merged: Tensor = model.visual.merger(rows.reshape(len(rows) * self.patches_per_token(model), -1))
        return merged

    def patches_per_token(self, model: Any) -> int:
        """Return how many patches the merger makes one token of."""
        return int(model.config.vision_config.spatial_merge_size**2)

    def in_order(self, model: Any, units: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        """Split the encoder's rows, one per token, into the tokens of each image."""
        return list(torch_split(units, [layout.patches for layout in layouts]))

    def pixels(self, kwargs: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        pixels = kwargs["pixel_values"]
        patches_per_token = len(pixels) // sum(layout.patches for layout in layouts)
        return list(torch_split(pixels, [patches_per_token * layout.patches for layout in layouts]))


class Qwen2VL(QwenVL):
    title = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    module, architecture = "qwen2_vl", "Qwen2VLForConditionalGeneration"


class Qwen25VL(QwenVL):
    title = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    module, architecture = "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"

    def depth(self, config: Mapping[str, Any]) -> int:
        return len(config["vision_config"]["fullatt_block_indexes"])  # the other layers attend within windows

    def attentions(self, model: Any) -> list[nn.Module]:
        blocks = model.visual.blocks
        return [blocks[layer].attn.attn for layer in model.config.vision_config.fullatt_block_indexes]

    def in_order(self, model: Any, units: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        side = model.config.vision_config.spatial_merge_size
        in_order = []
        for image, layout in zip(super().in_order(model, units, layouts), layouts, strict=True):
            height, width = layout.views[0]
            # vLLM permutes the tokens of an image so that each window is contiguous; argsort inverts a permutation
            window = model.visual.get_window_index_thw(1, height * side, width * side)[0]
            in_order.append(image[window.argsort().to(image.device)])
        return in_order


class Qwen3VL(QwenVL):
    title = "Qwen3-VL"
    model_types = ("qwen3_vl",)
    module, architecture = "qwen3_vl", "Qwen3VLForConditionalGeneration"


class Qwen3VLMoe(Qwen3VL):
    title = "Qwen3-VL with experts"
    model_types = ("qwen3_vl_moe",)
    module, architecture = "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"
