"""Define the base of methods that act inside a cross-modal encoder."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from tokensieve.crossmodal import CrossModal, Merge
from tokensieve.errors import Refusal
from tokensieve.methods.base import Method
from tokensieve.reduction import Reduction


@dataclass(frozen=True)
class FusionMethod(Method):
    """Base of methods that act inside a cross-modal encoder, on text and image at once: see :meth:`reduce_pair`."""

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.layers) != sorted(set(self.layers)) or min(self.layers, default=0) < 0:
            raise Refusal(f"layers must be layer numbers from 0, ascending, as in (2, 5, 8); got {self.layers!r}")

    @property
    def acts(self) -> bool:
        """Whether the parameters request any reduction; if not, no hook is installed."""
        return True

    @property
    def merges_text(self) -> bool:
        """Whether text tokens may leave; a head that reads every text token does not allow this."""
        return False

    @property
    def counts_padding(self) -> bool:
        """Whether padding is reduced like tokens, as in PuMer's code.

        Then masks are averaged, every query attends to its own key, and attention has their ε.
        """
        return False

    @property
    def follows_sizes(self) -> bool:
        """Whether a merged token counts in an average by the number of tokens that it stands for."""
        return False

    @abstractmethod
    def reduce_pair(self, layer: CrossModal) -> tuple[Merge | None, Merge | None]:
        """Decide about text and image in one layer, for a batch; ``None`` leaves that stream unchanged."""

    def reduce(self, image: Any) -> Reduction:
        raise Refusal(f"{self.info.name} acts inside cross-modal encoders (ViLT, METER, BridgeTower), not on an LLM")


@dataclass(frozen=True)
class KeepEverything(FusionMethod):
    """Keep every token of a cross-modal encoder: it stands for the method ``full`` there, and tokens are counted."""

    layers: tuple[int, ...] = ()

    def reduce_pair(self, layer: CrossModal) -> tuple[Merge | None, Merge | None]:
        return None, None
