"""Pixtral towers: packed patches of images of any size, and a break token after each row of the prompt's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokensieve.vllm.families.base import ServedFamily, torch_split
from tokensieve.vllm.families.llava import Llava

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tokensieve.models import TokenLayout


class PixtralTower(ServedFamily):
    writes_text = True

    def merge(self, config: Any) -> int:
        """Return the side, in patches, of the square that becomes one visual token."""
        return 1

    def built(self, config: Mapping[str, Any]) -> int:
        return Llava.built(self, config)  # type: ignore[arg-type]  # the same choice of hidden states

    def layout(self, config: Any, size: Sequence[int]) -> TokenLayout:
        from tokensieve.models import TokenLayout

        side, (height, width) = config.vision_config.patch_size * self.merge(config), size
        return TokenLayout.grid_of(height // side, width // side)

    def attentions(self, model: Any) -> list[nn.Module]:
        return [layer.attention.attn for layer in model.vision_tower.transformer.layers]

    def segments(self, model: Any, layouts: Sequence[TokenLayout]) -> list[int]:
        return [layout.patches * self.merge(model.config) ** 2 for layout in layouts]

    def units(self, model: Any, rows: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        from tokensieve.models.family import in_blocks

        side = self.merge(model.config)
        grids = [(height * side, width * side) for ((height, width),) in (layout.views for layout in layouts)]
        images = torch_split(rows[0], self.segments(model, layouts))
        return [in_blocks(image[None], grid, side).mean(1) for image, grid in zip(images, grids, strict=True)]


class Pixtral(PixtralTower):
    title = "Pixtral (LLaVA with a Pixtral tower)"
    model_types = ("llava",)
    module, architecture = "llava", "LlavaForConditionalGeneration"
    reduced_architecture = "TokensievePixtralForConditionalGeneration"  # vLLM has one class for all LLaVA-1.5

    def describes(self, config: Mapping[str, Any]) -> bool:
        return super().describes(config) and config["vision_config"].get("model_type") == "pixtral"


class Mistral3(PixtralTower):
    title = "Mistral 3"
    model_types = ("mistral3",)
    module, architecture = "mistral3", "Mistral3ForConditionalGeneration"

    def describes(self, config: Mapping[str, Any]) -> bool:
        return super().describes(config) and config["vision_config"].get("model_type") == "pixtral"

    def merge(self, config: Any) -> int:
        return int(config.spatial_merge_size)

    def projector(self, model: Any) -> nn.Module:
        layer: nn.Module = model.multi_modal_projector.patch_merger.merging_layer  # first module after the merging
        return layer

    def project(self, model: Any, rows: Tensor) -> Tensor:
        mlp = model.multi_modal_projector
        hidden, _ = mlp.linear_1(self.projector(model)(rows))
        projected: Tensor = mlp.linear_2(mlp.act(hidden))[0]
        return projected
