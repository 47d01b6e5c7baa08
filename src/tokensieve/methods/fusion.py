"""The base of methods that act inside a cross-modal encoder."""

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
        """Whether the parameters ask for any reduction at all; if not, nothing is hooked."""
        return True

    @property
    def merges_text(self) -> bool:
        """Whether text tokens may leave; a head that reads every one of them cannot have that."""
        return False

    @property
    def counts_padding(self) -> bool:
        """Whether padding is reduced like tokens; then masks are averaged, and every query sees its own key."""
        return False

    @property
    def follows_sizes(self) -> bool:
        """Whether a token that stands for several counts that much in an average."""
        return False

    @abstractmethod
    def reduce_pair(self, seen: CrossModal) -> tuple[Merge | None, Merge | None]:
        """Decide about the text and the image in one layer, for a batch; ``None`` leaves that stream as it is."""

    def reduce(self, image: Any) -> Reduction:
        raise Refusal(f"{self.info.name} acts inside cross-modal encoders (ViLT, METER, BridgeTower), not on an LLM")
