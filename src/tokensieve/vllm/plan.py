"""The plan of one image: a few whole numbers that the frontend sends to the worker with the image's data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from tokensieve.budget import count, share_out
from tokensieve.errors import Refusal
from tokensieve.methods import Method
from tokensieve.models import TokenLayout
from tokensieve.vllm.settings import Choice

PLAN, SPAN, WORDS = "tokensieve_plan", "tokensieve_span", "tokensieve_words"
"""The fields that the frontend adds to an image's data."""


@dataclass(frozen=True)
class ImagePlan:
    """The reduction of one image as far as it is known before the image is encoded.

    Attributes:
        method: number of the method among the engine's.
        budget: patches to keep of each part; all of them: the image stays whole.
        rows: rows that the worker returns: kept tokens, and the text tokens between the image's tokens.
        span: tokens from the image's first to its last before the reduction, text tokens between them included.
        size: the numbers that the layout follows from.
    """

    method: int
    budget: int
    rows: int
    span: int
    size: tuple[int, ...]

    @property
    def reduces(self) -> bool:
        """Whether the image loses tokens."""
        return self.rows < self.span

    @classmethod
    def of(
        cls, choice: Choice, parts: Sequence[TokenLayout], span: int, size: Sequence[int], from_tokens: int
    ) -> ImagePlan:
        """Return the plan of an image; images of fewer than ``from_tokens`` tokens stay whole.

        Args:
            parts: what is decided about with a budget of its own: the image, or each of its tiles, all of one size.
        """
        keep, patches, total = choice.method.budget, parts[0].patches, sum(part.total for part in parts)
        budget = patches if keep is None or total < from_tokens else count(keep, patches)
        kept = total if budget == patches else len(parts) * kept_tokens(choice.method.with_budget(budget), parts[0])
        return cls(choice.number, budget, kept + span - total, span, tuple(size))

    @classmethod
    def read(cls, numbers: Sequence[int]) -> ImagePlan:
        """Read :meth:`numbers`."""
        method, budget, rows, span, *size = numbers
        return cls(method, budget, rows, span, tuple(size))

    def numbers(self) -> list[int]:
        """Return the plan as whole numbers."""
        return [self.method, self.budget, self.rows, self.span, *self.size]


def kept_tokens(method: Method, layout: TokenLayout) -> int:
    """Return the number of tokens that a method leaves of an image with this layout; it depends on no pixel.

    A reduced image loses its separators.

    Raises:
        Refusal: if the number depends on the image's content.
    """
    by_view = len(layout.views) > 1 and method.needs.requests("grid")
    sizes = list(map(prod, layout.views)) if by_view else [layout.patches]
    grids = list(layout.views) if by_view else [layout.stacked]
    budget = method.budget
    assert budget is not None
    shares = share_out(budget, sizes) if by_view else [count(budget, sizes[0])]
    counts = [method.slots(share, grid) for share, grid in zip(shares, grids, strict=True)]
    known = [n for n in counts if n is not None]
    if len(known) < len(counts):
        raise Refusal(f"{method} decides by the image's content how many tokens stay: an engine must know before")
    return sum(known)
