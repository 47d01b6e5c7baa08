"""A family: the declarations that cannot be discovered from a live model."""

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


@dataclass(eq=False)
class EncodeCall:
    """One call of ``get_image_features`` (or ``get_video_features``) of the base model, as far as it has come.

    Attributes:
        inputs: its arguments by name.
        modality: what it encodes.
        tower: the arguments of the tower's forward by name.
        output: what it returned, ``pooler_output`` and all; ``None`` until then.
    """

    inputs: dict[str, Any]
    modality: Modality = "image"
    tower: dict[str, Any] = field(default_factory=dict)
    output: Any = None

    @cached_property
    def sizes(self) -> list[list[int]]:
        """(height, width) of each image in pixels, as the model is given them; one look at the device."""
        sizes: list[list[int]] = torch.as_tensor(self.inputs["image_sizes"]).tolist()
        return sizes


class Family(ABC):
    """One family of vision-language models; its subclasses are declarations, one file each.

    As it stands, it describes a tower that sees tiles of equal size, `[b, 3, H, W]`, and a projector that makes one
    row of each unit of ``merge`` x ``merge`` patches, in raster order. *Units* are these rows, in the order in which
    the projector makes them; an image's :class:`TokenLayout` says which of them it shows.

    Attributes:
        stages: where methods can act.
        modalities: what can be reduced.
        joins: tiles that stand side by side in the prompt are one image; else each entry that the encoder returns is.
        excluded: why methods cannot act inside the LLM, if they cannot.
        own_masks: the LLM's blocks do not share one causal mask; methods inside it need a kernel that takes any mask.
        untested: what was discovered instead of declared is checked once more in every call.
        first_position: the position id of a prompt's first token.
        opaque: why nothing that is read in the tower can be told per visual token, if it cannot.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    stages: ClassVar[tuple[Stage, ...]] = ("connector", "decoder")
    modalities: ClassVar[tuple[Modality, ...]] = ("image",)
    excluded: ClassVar[str] = ""
    own_masks: ClassVar[bool] = False
    untested: ClassVar[bool] = False
    first_position: ClassVar[int] = 0
    joins: ClassVar[bool] = False
    opaque: ClassVar[str] = ""

    @property
    def limits(self) -> str:
        """What does not work in this family, in a line."""
        inside = "methods inside the LLM need SDPA or eager attention" if self.own_masks else ""
        inside = f"nothing inside the LLM: {self.excluded}" if self.excluded else inside
        before = f"nothing that reads the encoder: {self.opaque}" if self.opaque else ""
        return "; ".join(filter(None, (inside, before)))

    def describes(self, config: Any) -> bool:
        """Whether a model of this config is of this family."""
        return getattr(config, "model_type", None) in self.model_types

    # -- where things are ---------------------------------------------------------------------------------------------

    def tower(self, model: Any) -> nn.Module:
        """The vision tower."""
        tower: nn.Module = model.get_encoder(modality="image")
        return tower

    def towers(self, model: Any) -> list[nn.Module]:
        """Every vision tower, the one of images first."""
        return [self.tower(model)]

    def attentions(self, tower: Any) -> list[nn.Module]:
        """Attention modules of the encoder layers in which every patch of an image sees every other, first to last."""
        lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) and _attention(m[0]) is not None]
        alike = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
        found = [_attention(layer) for layer in max(alike, key=len, default=[])]
        return [attention for attention in found if attention is not None]

    def has_cls(self, tower: Any) -> bool:
        """Whether the tower has a [CLS] token (as row 0); else a pooling head or attention received stands in."""
        return any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters())

    def pooling_head(self, tower: Any) -> Pooling | None:
        """How a head pools what the tower puts out: `[B, n, C]` to a query `[B, H, 1, d]` and keys `[B, H, n, d]`."""
        return pooling_head(tower)

    def projector(self, model: Any) -> nn.Module:
        """The module whose input :meth:`patches` reads."""
        projector: nn.Module = model.base_model.multi_modal_projector
        return projector

    def merge(self, model: Any) -> int:
        """Patches along the side of the square unit that becomes one visual token."""
        return 1

    # -- what the rows mean -------------------------------------------------------------------------------------------

    def entries(self, pooled: Sequence[Tensor], shapes: Sequence[TokenLayout]) -> list[Tensor]:
        """The features of each image, `[N, D]`, in the ``pooler_output`` of a call (with beams: repeated)."""
        return list(pooled)

    def shapes(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        """How the visual tokens of each image lie, in the order of :meth:`entries`."""
        tiles, (height, width) = len(call.tower["pixel_values"]), self.tile(model, call)
        return [TokenLayout.grid_of(height, width)] * tiles

    def tile(self, model: Any, call: EncodeCall) -> Grid:
        """(height, width) of one tile in visual tokens."""
        height, width = self._patches_of_tile(model, call)
        side = self.merge(model)
        return height // side, width // side

    def read(self, model: Any, call: EncodeCall, reads: Sequence[Tensor]) -> Tensor:
        """What a probe read, attention call by call `[b, keys, ...]`, as one row per unit, `[U, ...]`: their mean."""
        rows = torch.cat(list(reads))[:, int(self.has_cls(self.tower(model))) :]
        return self.in_units(model, call, rows).mean(1)

    def patches(self, model: Any, call: EncodeCall, rows: Tensor) -> Tensor:
        """What entered :meth:`projector` as one row per unit, `[U, C]`."""
        return rows.flatten(0, -2)

    def project(self, model: Any, rows: Tensor) -> Tensor:
        """The projector on any rows that :meth:`patches` made, `[n, C]` to `[n, D]`."""
        projected: Tensor = self.projector(model)(rows)
        return projected

    def in_units(self, model: Any, call: EncodeCall, rows: Tensor) -> Tensor:
        """Rows of all patches `[b, P, ...]`, tile by tile, as those of each unit `[U, unit, ...]`."""
        return in_blocks(rows, self._patches_of_tile(model, call), self.merge(model))

    def _patches_of_tile(self, model: Any, call: EncodeCall) -> Grid:
        tower: Any = self.tower(model)
        patch, (height, width) = tower.config.patch_size, call.tower["pixel_values"].shape[-2:]
        patch = patch[0] if isinstance(patch, list | tuple) else patch
        return height // patch, width // patch

    # -- the encoder stage --------------------------------------------------------------------------------------------

    def vit_layers(self, tower: Any) -> list[VitLayer]:
        """The layers of a plain ViT tower, between which tokens may leave; none where the tower is of another kind."""
        return []

    def layers_used(self, model: Any) -> int:
        """How many layers of the tower the visual tokens depend on."""
        return len(self.attentions(self.tower(model)))

    def resize(self, tower: Any, inputs: dict[str, Any], cells: Sequence[Grid]) -> dict[str, Any]:
        """Tower inputs for the same images drawn smaller: ``cells[i]`` visual tokens for image i."""
        raise NotImplementedError

    def restore(self, tower: Any, output: Any, reductions: Sequence[Reduction]) -> None:
        """Put the rows of resized images back at their anchors, in place, so that the model sees its usual shapes.

        The slots in between hold zeros; the connector stage drops them.
        """
        raise NotImplementedError


def in_blocks(rows: Tensor, grid: Grid, side: int) -> Tensor:
    """Rows `[b, P, ...]` on a grid as those of its blocks of ``side`` x ``side``, `[b · blocks, side², ...]`."""
    height, width = grid[0] // side, grid[1] // side
    on_grid = rows.view(len(rows), *grid, *rows.shape[2:])[:, : height * side, : width * side]
    blocks = on_grid.reshape(len(rows), height, side, width, side, *rows.shape[2:])
    units: Tensor = blocks.transpose(2, 3).flatten(3, 4).flatten(0, 2)
    return units


def spread(rows: Tensor, reduction: Reduction, specials: int = 0) -> Tensor:
    """Rows of K slots back at their anchors among N, zeros between: `[specials + K, D]` to `[specials + N, D]`."""
    out = rows.new_zeros((specials + reduction.total, rows.shape[-1]))
    out[:specials] = rows[:specials]
    out[specials + reduction.anchors] = rows[specials:]
    return out


def timm_attentions(blocks: nn.Module) -> list[nn.Module]:
    """The attention modules in blocks of timm's, first to last; each says whether it calls torch's fused kernel."""
    return [module for module in blocks.modules() if hasattr(module, "fused_attn")]


def _attention(layer: nn.Module) -> nn.Module | None:
    """The module of a layer that goes through transformers' attention interface, if there is one."""
    for module in layer.modules():
        if "Attention" in type(module).__name__ and hasattr(module, "config"):
            return module
    return None
