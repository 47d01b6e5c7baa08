"""Idefics3 and SmolVLM: tiles with marker tokens between them (each tile is one image here), and pixel shuffle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokensieve.vllm.families.base import ServedFamily, torch_split

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tokensieve.models import TokenLayout


class Idefics3(ServedFamily):
    """``layouts`` in the worker are those of the tiles."""

    title = "Idefics3"
    model_types = ("idefics3",)
    module, architecture = "idefics3", "Idefics3ForConditionalGeneration"
    writes_text = True
    tiles_are_images = True

    def size(self, config: Any, item: Mapping[str, Any]) -> tuple[int, ...]:
        tiles, _, height, width = item["pixel_values"].shape
        return tiles, height, width

    def layout(self, config: Any, size: Sequence[int]) -> TokenLayout:
        from tokensieve.models import TokenLayout

        (tiles, height, width), side = size, config.vision_config.patch_size * config.scale_factor
        view = height // side, width // side
        return TokenLayout(tiles * view[0] * view[1], (view,) * tiles)

    def has_cls(self, config: Any) -> bool:
        return False

    def attentions(self, model: Any) -> list[nn.Module]:
        return [layer.self_attn.attn for layer in model.model.vision_model.encoder.layers]

    def units(self, model: Any, rows: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        units = self._in_units(model, rows, layouts).mean(1)
        return list(torch_split(units, [layout.total for layout in layouts]))

    def projector(self, model: Any) -> nn.Module:
        connector: nn.Module = model.model.connector
        return connector

    def patches(self, model: Any, rows: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        units = self._in_units(model, rows, layouts).flatten(1)
        return list(torch_split(units, [layout.total for layout in layouts]))

    def project(self, model: Any, rows: Tensor) -> Tensor:
        tiles = rows.view(len(rows), model.config.scale_factor**2, -1)  # the connector shuffles tiles: one per unit
        projected: Tensor = self.projector(model)(tiles)
        return projected.view(len(rows), -1)

    def pixels(self, kwargs: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        return list(torch_split(kwargs["pixel_values"], [len(layout.views) for layout in layouts]))

    def pixel_hashes(self, kwargs: Mapping[str, Any], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        from tokensieve.ops import pixel_hash

        return [pixel_hash(tile)[None] for tile in kwargs["pixel_values"]]

    def _in_units(self, model: Any, rows: Tensor, layouts: Sequence[TokenLayout]) -> Tensor:
        """Group the rows `[tiles, P, ...]` by visual token, `[units, patches of a unit, ...]`."""
        from tokensieve.models.family import in_blocks

        side, (height, width) = model.config.scale_factor, layouts[0].views[0]  # all tiles are of one size
        return in_blocks(rows, (height * side, width * side), side)


class SmolVLM(Idefics3):
    title = "SmolVLM"
    model_types = ("smolvlm",)
    module, architecture = "smolvlm", "SmolVLMForConditionalGeneration"
