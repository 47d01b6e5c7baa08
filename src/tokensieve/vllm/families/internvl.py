"""InternVL in transformers' format: adjacent tiles and a thumbnail are one image; pixel shuffle joins 2x2 patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokensieve.vllm.families.base import ServedFamily, torch_split

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tokensieve.models import TokenLayout


class InternVL(ServedFamily):
    title = "InternVL"
    model_types = ("internvl",)
    module, architecture = "interns1", "InternS1ForConditionalGeneration"
    reduced_architecture = "TokensieveInternVLForConditionalGeneration"

    def merge(self, config: Any) -> int:
        """Return the side, in patches, of the square that becomes one visual token."""
        return round(1 / float(config.downsample_ratio))

    def size(self, config: Any, item: Mapping[str, Any]) -> tuple[int, ...]:
        tiles, _, height, width = item["pixel_values"].shape
        return tiles, height, width

    def layout(self, config: Any, size: Sequence[int]) -> TokenLayout:
        from tokensieve.models import TokenLayout

        tiles, height, width = size
        side = config.vision_config.patch_size[0] * self.merge(config)
        view = height // side, width // side
        return TokenLayout(tiles * view[0] * view[1], (view,) * tiles)

    def has_cls(self, config: Any) -> bool:
        return True

    def attentions(self, model: Any) -> list[nn.Module]:
        return [layer.attention.attn for layer in model.vision_tower.encoder.layer]

    def units(self, model: Any, rows: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        from tokensieve.models.family import in_blocks

        side, (height, width) = self.merge(model.config), layouts[0].views[0]  # all tiles are of one size
        units = in_blocks(rows[:, 1:], (height * side, width * side), side).mean(1)
        return list(torch_split(units, [layout.patches for layout in layouts]))

    def pixels(self, kwargs: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        return list(torch_split(kwargs["pixel_values"], [len(layout.views) for layout in layouts]))

    def pixel_hashes(self, kwargs: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        import torch

        from tokensieve.ops import pixel_hash

        images = self.pixels(kwargs, layouts)
        return [torch.stack([pixel_hash(tile) for tile in tiles]) for tiles in images]
