"""Provide the baselines that every method must beat: full, random, uniform, pool and downsample."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import ConnectorMethod, EncoderNeeds, Method, Needs, ResizeMethod, register
from tokensieve.ops import area_pool, pooled_grid, random_scores, top_k, uniform
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, VisualTokens, given


@register("full", paper="baseline")
@dataclass(frozen=True)
class Full(Method):
    """Keep every token: the unreduced model, measured on the same code path.

    Cost: none.
    """

    keeps_everything: ClassVar[bool] = True

    def reduce(self, image: VisualTokens) -> Reduction:
        batch, total, _ = image.features.shape
        return Reduction.identity(total, batch, image.features.device, grid=image.grid)


@register("random", paper="baseline", needs=Needs(pixel_hash=True))
@dataclass(frozen=True)
class Random(ConnectorMethod):
    """Keep tokens at random positions, different for every image and seed.

    The choice depends on the seed, the image's pixels and the number of tokens only, so a batch row keeps the tokens
    that it keeps alone, and every question about an image has the same tokens.

    Args:
        keep: tokens per image, or a share of them.
        seed: of the random positions.

    Cost: O(N log N) time and O(N) memory, and one pass over the pixels; nothing is read in the encoder.
    """

    keep: Budget = 0.25
    seed: int = 0

    def reduce(self, image: ConnectorTokens) -> Reduction:
        scores = random_scores(given(image.pixel_hash), image.total, self.seed)
        return image.keep(top_k(scores, image.budget))


@register("uniform", paper="baseline")
@dataclass(frozen=True)
class Uniform(Method):
    """Keep every n-th token in raster order.

    Args:
        keep: tokens per image, or a share of them.

    Cost: O(K) time and memory; no evidence is read.
    """

    keep: Budget = 0.25

    def reduce(self, image: VisualTokens) -> Reduction:
        return image.keep(uniform(image.total, image.budget, image.features.device).expand(len(image.features), -1))


@register("pool", paper="baseline", needs=Needs(grid=True))
@dataclass(frozen=True)
class Pool(Method):
    """Average-pool the tokens on their 2-D grid, to the largest grid of at most ``keep`` cells.

    Any ratio works: a token on the border of two cells counts in both by its overlap.

    Args:
        keep: tokens per image, or a share of them.

    Cost: O(K·N) time and memory for the overlaps of cells and tokens; no evidence is read.
    """

    keep: Budget = 0.25

    def cells(self, grid: tuple[int, int], budget: int) -> tuple[int, int]:
        return pooled_grid(grid, budget)

    def slots(self, budget: int, grid: tuple[int, int] | None) -> int | None:
        return None if grid is None else prod(self.cells(grid, budget))

    def reduce(self, image: VisualTokens) -> Reduction:
        if image.grid is None:
            raise Refusal(f"{self.info.name} needs tokens on a grid; these {image.total} tokens have none")
        height, width = self.cells(image.grid, image.budget)
        batch, device = len(image.features), image.features.device
        pooled = area_pool(image.grid, (height, width))  # from the two grids alone: one matrix for all images
        anchors, slot, source, weight = (part.to(device).expand(batch, -1) for part in pooled)
        return image.merge(anchors, slot, source, weight, f"{height}x{width} cells for a budget of {image.budget}")


@register("downsample", paper="baseline", stage="encoder", needs=EncoderNeeds(grid=True))
@dataclass(frozen=True)
class Downsample(Pool, ResizeMethod):
    """Resize the image before the vision encoder, so that fewer tokens are made: cheaper in the encoder, too.

    Args:
        keep: tokens per image, or a share of them.

    Cost: as ``pool``; the vision encoder then processes K tokens instead of N.
    """
