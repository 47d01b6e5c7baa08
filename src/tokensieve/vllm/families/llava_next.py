"""LLaVA-NeXT and LLaVA-OneVision: a base tile, a mosaic of tiles of any resolution, and newline tokens.

Videos of LLaVA-OneVision stay whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import nan, prod
from typing import TYPE_CHECKING, Any, ClassVar

from tokensieve.vllm.families.llava import Llava

if TYPE_CHECKING:
    from torch import Tensor

    from tokensieve.methods import Method
    from tokensieve.models import TokenLayout


class LlavaNext(Llava):
    title = "LLaVA-NeXT"
    model_types = ("llava_next",)
    module, architecture = "llava_next", "LlavaNextForConditionalGeneration"
    most_tiles: ClassVar[int | None] = None  # a mosaic of more is resampled

    def size(self, config: Any, item: Mapping[str, Any]) -> tuple[int, ...]:
        height, width = item["image_sizes"].tolist()
        return height, width

    def layout(self, config: Any, size: Sequence[int]) -> TokenLayout:
        from tokensieve.models.any_resolution import layout_of_size

        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        return layout_of_size(size, config.image_grid_pinpoints, vision.image_size, side, self.most_tiles)

    def layouts(self, config: Any, sizes: Sequence[Sequence[int]], kwargs: Mapping[str, Any]) -> list[TokenLayout]:
        layouts, start = [], 0
        for layout, tiles in zip(super().layouts(config, sizes, kwargs), kwargs["pixel_values"], strict=True):
            layouts.append(layout if layout.units is None else replace(layout, units=layout.units + start))
            start += len(tiles) * prod(layout.views[0])  # tiles that only pad a batch are encoded, too
        return layouts

    def units(self, model: Any, rows: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        return _by_unit(rows[:, int(self.has_cls(model.config)) :].flatten(0, 1), layouts)

    def patches(self, model: Any, rows: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        return _by_unit(rows.flatten(0, -2), layouts)


class LlavaOnevision(LlavaNext):
    title = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    module, architecture = "llava_onevision", "LlavaOnevisionForConditionalGeneration"
    most_tiles = 9

    def unserved(self, config: Mapping[str, Any], method: Method) -> str | None:
        ratio = config.get("vision_aspect_ratio", "anyres_max_9")
        if ratio != "anyres_max_9":
            return f"the checkpoint has vision_aspect_ratio={ratio!r}, and vLLM packs images as with 'anyres_max_9'"
        return super().unserved(config, method)


def _by_unit(rows: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
    """Return the rows of the patches of each image, from one row per unit.

    Rows of a resampled image belong to none of its patches: they are NaN, and no method that reads them is let through.
    """
    return [
        rows.new_full((layout.patches, *rows.shape[1:]), nan)
        if layout.units is None
        else rows[layout.units.to(rows.device)]
        for layout in layouts
    ]
