"""The base of model families: what Tokensieve cannot discover from a live model, as declarations."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from tokensieve.methods.base import Stage
from tokensieve.models.layout import Grid, TokenLayout
from tokensieve.models.vit import Pooling, VitLayer, pooling_head
from tokensieve.reduction import Reduction

Modality: TypeAlias = Literal["image", "video"]
PIXELS: dict[Modality, tuple[str, ...]] = {
    "image": ("pixel_values", "pixel_values_images"),
    "video": ("pixel_values_videos",),
}
"""The arguments that hold the pixels of each modality."""


@dataclass(eq=False)
class EncodeCall:
    """One call of the base model's ``get_image_features`` or ``get_video_features``.

    Attributes:
        inputs: arguments of the call, by name.
        modality: "image" or "video".
        encoder_inputs: arguments of the vision encoder's forward, by name.
        output: the returned output with its ``pooler_output``; ``None`` before the call returns.
    """

    inputs: dict[str, Any]
    modality: Modality = "image"
    encoder_inputs: dict[str, Any] = field(default_factory=dict)
    output: Any = None

    @cached_property
    def sizes(self) -> list[list[int]]:
        """Return (height, width) of each image in pixels, from ``image_sizes``; synchronises with the device once."""
        sizes: list[list[int]] = torch.as_tensor(self.inputs["image_sizes"]).tolist()
        return sizes


class Family(ABC):
    """One family of vision-language models. Each subclass declares one family in a file of its own.

    The defaults describe a vision encoder that receives tiles of equal size, `[b, 3, H, W]`, and a projector that makes
    one row of each ``merge`` x ``merge`` patches, in raster order. Such a row is a *unit*. Units are numbered in the
    projector's output order; the :class:`TokenLayout` of an image lists the units that its tokens show.

    Attributes:
        stages: the stages at which methods can act.
        modalities: the modalities that can be reduced.
        joins_tiles: adjacent tiles of the prompt are one image. By default, each entry of the encoder's output is one.
        decoder_unsupported: the reason why methods cannot act inside the LLM; empty if they can.
        per_layer_masks: the LLM's layers use different masks, so decoder methods need a kernel that takes any mask.
        untested: the family is discovered instead of declared; every call checks the discovered layout again.
        first_position: the position id of a prompt's first token.
        encoder_unreadable: the reason why encoder evidence cannot be mapped to visual tokens; empty if it can.
        takes_subsets: the vision encoder can process the patches of some of an image's tokens only (:meth:`subset`).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    stages: ClassVar[tuple[Stage, ...]] = ("connector", "decoder")
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    decoder_unsupported: ClassVar[str] = ""
    per_layer_masks: ClassVar[bool] = False
    untested: ClassVar[bool] = False
    first_position: ClassVar[int] = 0
    joins_tiles: ClassVar[bool] = False
    encoder_unreadable: ClassVar[str] = ""
    takes_subsets: ClassVar[bool] = False

    @property
    def limits(self) -> str:
        """Describe in one line what this family does not support."""
        decoder = "methods inside the LLM need SDPA or eager attention" if self.per_layer_masks else ""
        decoder = f"no methods inside the LLM: {self.decoder_unsupported}" if self.decoder_unsupported else decoder
        encoder = f"no methods that read the encoder: {self.encoder_unreadable}" if self.encoder_unreadable else ""
        return "; ".join(filter(None, (decoder, encoder)))

    def describes(self, config: Any) -> bool:
        """Return whether a model with this config belongs to this family."""
        return getattr(config, "model_type", None) in self.model_types

    # -- modules ------------------------------------------------------------------------------------------------------

    def tower(self, model: Any) -> nn.Module:
        """Return the vision encoder of images."""
        tower: nn.Module = model.get_encoder(modality="image")
        return tower

    def towers(self, model: Any) -> list[nn.Module]:
        """Return all vision encoders; the one of images comes first."""
        return [self.tower(model)]

    def attentions(self, tower: Any) -> list[nn.Module]:
        """Return the attention modules of the layers with full attention over an image's patches, first to last."""
        attentions = [_attention(layer) for layer in layer_list(tower)]
        return [attention for attention in attentions if attention is not None]

    def has_cls(self, tower: Any) -> bool:
        """Return whether row 0 of the encoder is a [CLS] token. Without one, other evidence replaces its attention."""
        return any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters())

    def pooling_head(self, tower: Any) -> Pooling | None:
        """Return the map from rows `[B, n, C]` to the pooling head's query `[B, H, 1, d]` and keys `[B, H, n, d]`."""
        return pooling_head(tower)

    def projector(self, model: Any) -> nn.Module:
        """Return the module whose input :meth:`patches` reads."""
        projector: nn.Module = model.base_model.multi_modal_projector
        return projector

    def merge(self, model: Any) -> int:
        """Return the side, in patches, of the square unit that becomes one visual token."""
        return 1

    # -- rows ---------------------------------------------------------------------------------------------------------

    def features_per_image(self, pooled: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[Tensor]:
        """Return the features `[N, D]` of each image from a call's ``pooler_output`` (repeated for beams)."""
        return list(pooled)

    def pixels_per_image(self, call: EncodeCall, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        """Return the pixels of each image, in the order of the layouts; batches pad them at the ends of axes only."""
        return list(self.pixels(call))

    def pixels(self, call: EncodeCall) -> Tensor:
        """Return the pixels that the call was given."""
        pixels: Tensor = next(call.inputs[name] for name in PIXELS[call.modality] if call.inputs.get(name) is not None)
        return pixels

    def layouts(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        """Return the token layout of each image, in the order of :meth:`features_per_image`."""
        tiles, (height, width) = len(call.encoder_inputs["pixel_values"]), self.tile(model, call)
        return [TokenLayout.grid_of(height, width)] * tiles

    def tile(self, model: Any, call: EncodeCall) -> Grid:
        """Return (height, width) of one tile in visual tokens."""
        height, width = self._patches_of_tile(model, call)
        side = self.merge(model)
        return height // side, width // side

    def to_units(self, model: Any, call: EncodeCall, reads: Sequence[Tensor]) -> Tensor:
        """Average probe rows over the patches of each unit: one `[b, keys, ...]` per attention call to `[U, ...]`."""
        rows = torch.cat(list(reads))[:, int(self.has_cls(self.tower(model))) :]  # [CLS] belongs to no unit
        return self.in_units(model, call, rows).mean(1)

    def patches(self, model: Any, call: EncodeCall, rows: Tensor) -> Tensor:
        """Reshape the input of :meth:`projector` to one row per unit, `[U, C]`."""
        return rows.flatten(0, -2)

    def project(self, model: Any, rows: Tensor) -> Tensor:
        """Run the projector on rows from :meth:`patches`, `[n, C]` to `[n, D]`."""
        projected: Tensor = self.projector(model)(rows)
        return projected

    def in_units(self, model: Any, call: EncodeCall, rows: Tensor) -> Tensor:
        """Group the patch rows `[b, P, ...]` of all tiles by unit, `[U, patches of a unit, ...]`."""
        return in_blocks(rows, self._patches_of_tile(model, call), self.merge(model))

    def _patches_of_tile(self, model: Any, call: EncodeCall) -> Grid:
        tower: Any = self.tower(model)
        patch, (height, width) = tower.config.patch_size, call.encoder_inputs["pixel_values"].shape[-2:]
        patch = patch[0] if isinstance(patch, list | tuple) else patch
        return height // patch, width // patch

    # -- the encoder stage --------------------------------------------------------------------------------------------

    def vit_layers(self, tower: Any) -> list[VitLayer]:
        """Return the layers of a plain ViT, between which tokens can be dropped; none for other encoders."""
        return []

    def layers_used(self, model: Any) -> int:
        """Return the number of encoder layers that the visual tokens depend on."""
        return len(self.attentions(self.tower(model)))

    def resize(self, tower: Any, inputs: dict[str, Any], cells: Sequence[Grid]) -> dict[str, Any]:
        """Resize the images in the encoder's inputs so that image i has a grid of ``cells[i]`` visual tokens."""
        raise NotImplementedError

    def token_pixels(self, model: Any, call: EncodeCall, method: str) -> list[Tensor]:
        """Return the pixels of the visual tokens of each image, `[height, width, d]` float32; white is 1, black 0.

        Raises:
            Refusal: for videos; names the method.
        """
        raise NotImplementedError

    def subset(self, tower: Any, inputs: dict[str, Any], reductions: Sequence[Reduction]) -> dict[str, Any]:
        """Return the encoder's inputs for the patches of the kept tokens only, each at its own place in its image."""
        raise NotImplementedError

    def restore(self, tower: Any, output: Any, reductions: Sequence[Reduction]) -> None:
        """Scatter the rows of smaller images to their anchors, in place, so that the model receives its usual shapes.

        The other rows are zero; the connector stage drops them.
        """
        raise NotImplementedError


def in_blocks(rows: Tensor, grid: Grid, side: int) -> Tensor:
    """Group rows `[b, P, ...]` of a grid into squares of ``side`` x ``side``, `[b · squares, side², ...]`."""
    height, width = grid[0] // side, grid[1] // side  # patches beyond the last whole square belong to no unit
    on_grid = rows.view(len(rows), *grid, *rows.shape[2:])[:, : height * side, : width * side]
    blocks = on_grid.reshape(len(rows), height, side, width, side, *rows.shape[2:])
    # [b, height, side, width, side, ...]: both sides must be neighbours before they are flattened
    units: Tensor = blocks.transpose(2, 3).flatten(3, 4).flatten(0, 2)
    return units


def scatter_to_anchors(rows: Tensor, reduction: Reduction, specials: int = 0) -> Tensor:
    """Scatter K slots to their anchors among N zero rows, `[specials + K, D]` to `[specials + N, D]`."""
    out = rows.new_zeros((specials + reduction.total, rows.shape[-1]))
    out[:specials] = rows[:specials]
    out[specials + reduction.anchors] = rows[specials:]
    return out


def layer_list(tower: nn.Module) -> list[nn.Module]:
    """Return the layers of a vision encoder: its longest list of modules of one type that hold attention."""
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) and _attention(m[0]) is not None]
    uniform = [list(layers) for layers in lists if len({type(layer) for layer in layers}) == 1]
    return max(uniform, key=len, default=[])


def timm_attentions(blocks: nn.Module) -> list[nn.Module]:
    """Return the attention modules of timm blocks, first to last."""
    return [module for module in blocks.modules() if hasattr(module, "fused_attn")]  # only attention has this flag


def _attention(layer: nn.Module) -> nn.Module | None:
    """Return the module of a layer that calls transformers' attention interface, if there is one."""
    for module in layer.modules():
        if "Attention" in type(module).__name__ and hasattr(module, "config"):
            return module
    return None
