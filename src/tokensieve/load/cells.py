"""The grid of a load test: one cell for each image size, prompt length, output length and load."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from tokensieve.errors import Refusal

LARGEST_SIDE = 16_384  # pixels


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        width, height: of the image, in pixels.
        words: of the question.
        output_tokens: asked for; servers without ``ignore_eos`` can answer with fewer.
        users: that send their next request when the previous one has ended; ``None`` in an open loop.
        rate: mean arrivals per second of the open loop; ``None`` in a closed loop.
    """

    width: int
    height: int
    words: int
    output_tokens: int
    users: int | None = None
    rate: float | None = None

    @property
    def size(self) -> str:
        """Return the image size as the command line takes it."""
        return str(self.width) if self.width == self.height else f"{self.width}x{self.height}"

    @property
    def load(self) -> str:
        """Return the load in words: "8 users" or "2.5 a second"."""
        if self.rate is not None:
            return f"{self.rate:g} a second"
        return "1 user" if self.users == 1 else f"{self.users} users"

    def __str__(self) -> str:
        """Return the cell in words."""
        return f"{self.size} px, {self.words} words, {self.output_tokens} tokens, {self.load}"


def grid(
    sizes: Sequence[tuple[int, int]],
    words: Sequence[int],
    output_tokens: Sequence[int],
    users: Sequence[int],
    rates: Sequence[float],
) -> list[Cell]:
    """Return the cells of the closed loops, then those of the open loops; within a load, by image size.

    Raises:
        Refusal: neither users nor rates.
    """
    loads: list[tuple[int | None, float | None]] = [*((u, None) for u in users), *((None, r) for r in rates)]
    if not loads:
        raise Refusal("a load test needs --concurrency or --rates; both are empty")
    by_area = sorted(set(sizes), key=lambda size: (size[0] * size[1], size))
    return [
        Cell(width, height, count, tokens, user_count, rate)
        for (user_count, rate), tokens, count, (width, height) in product(loads, output_tokens, words, by_area)
    ]


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Return the (width, height) of image sizes with commas between: "336, 672x448".

    Raises:
        Refusal: a part that is no size.
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\s*[xX×]\s*(\d+))?", part.strip())
        size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not all(1 <= side <= LARGEST_SIDE for side in size):
            raise Refusal(
                f"--image-sizes takes pixels such as 336 or 672x448, up to {LARGEST_SIDE:,}; got {part.strip()!r}"
            )
        sizes.append(size)
    return sizes
