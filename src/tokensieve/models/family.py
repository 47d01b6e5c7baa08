"""A family: the declarations that cannot be discovered from a live model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from tokensieve.methods.base import Stage
from tokensieve.models.vit import VitLayer
from tokensieve.reduction import Reduction

Grid = tuple[int, int]
Inputs = Mapping[str, Any]


class Family(ABC):
    """One family of vision-language models; its subclasses are declarations, one file each.

    Everything about a *tower call* is expressed per image: ``inputs`` are the arguments of the vision tower's forward
    by name, images are in the order in which the tower sees them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    stages: ClassVar[tuple[Stage, ...]] = ("encoder", "connector", "decoder")

    def tower(self, model: Any) -> nn.Module:
        """The vision tower."""
        tower: nn.Module = model.get_encoder(modality="image")
        return tower

    @abstractmethod
    def attentions(self, tower: Any) -> list[nn.Module]:
        """Attention modules of the encoder layers in which every patch of an image sees every other, first to last."""

    @abstractmethod
    def has_cls(self, tower: Any) -> bool:
        """Whether the tower has a [CLS] token (as row 0); else a pooling head or attention received stands in."""

    def pooling_head(self, tower: Any, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """Query `[B, H, 1, d]` and keys `[B, H, n, d]` of a head that pools what the tower puts out, `[B, n, C]`."""
        return None

    def vit_layers(self, tower: Any) -> list[VitLayer]:
        """The layers of a plain ViT tower, between which tokens may leave; none where the tower is of another kind."""
        return []

    def layers_used(self, model: Any) -> int:
        """How many layers of the tower the visual tokens depend on."""
        return len(self.attentions(self.tower(model)))

    @abstractmethod
    def grids(self, tower: Any, inputs: Inputs) -> list[Grid]:
        """(height, width) of each image in visual tokens."""

    @abstractmethod
    def per_token(self, tower: Any, inputs: Inputs, rows: Sequence[Tensor]) -> list[Tensor]:
        """What a probe read, call by call `[b, keys, ...]`, as one `[N, ...]` per image, in token order."""

    @abstractmethod
    def projector(self, model: Any) -> nn.Module:
        """The module that turns the encoder's rows into visual tokens, each row or group of rows by itself."""

    @abstractmethod
    def patches(self, tower: Any, inputs: Inputs, rows: Tensor) -> list[Tensor]:
        """What entered the projector as one row per visual token, `[N, C]` per image, in token order."""

    @abstractmethod
    def project(self, model: Any, rows: Tensor) -> Tensor:
        """The projector on any rows that :meth:`patches` made, `[n, C]` to `[n, D]`."""

    @abstractmethod
    def resize(self, tower: Any, inputs: Inputs, cells: Sequence[Grid]) -> dict[str, Any]:
        """Tower inputs for the same images drawn smaller: ``cells[i]`` visual tokens for image i."""

    @abstractmethod
    def restore(self, tower: Any, output: Any, reductions: Sequence[Reduction]) -> None:
        """Put the rows of resized images back at their anchors, in place, so that the model sees its usual shapes.

        The slots in between hold zeros; the connector stage drops them.
        """


def families() -> list[Family]:
    """All families that Tokensieve knows, by name."""
    from tokensieve.models.llava import Llava
    from tokensieve.models.qwen_vl import QwenVL

    return [Llava(), QwenVL()]


def family_of(model: Any) -> Family:
    """The family of a live model.

    Raises:
        ValueError: if the model is of no known family; names those that are.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in families():
        if model_type in family.model_types:
            return family
    known = ", ".join(t for family in families() for t in family.model_types)
    raise ValueError(
        f"{type(model).__name__} (model type {model_type!r}) is of no supported family; supported: {known}"
    )


def spread(rows: Tensor, reduction: Reduction, specials: int = 0) -> Tensor:
    """Rows of K slots back at their anchors among N, zeros between: `[specials + K, D]` to `[specials + N, D]`."""
    out = rows.new_zeros((specials + reduction.total, rows.shape[-1]))
    out[:specials] = rows[:specials]
    out[specials + reduction.anchors] = rows[specials:]
    return out
