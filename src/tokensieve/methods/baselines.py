"""The baselines that every method must beat: full, random, uniform, pool and downsample."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import ConnectorMethod, EncoderNeeds, Method, Needs, ResizeMethod, register
from tokensieve.ops import area_pool, pooled_grid, uniform
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens


@register("full", paper="baseline")
@dataclass(frozen=True)
class Full(ConnectorMethod):
    """Keep every token: the unreduced model, measured through the same path.

    Cost: none.
    """

    keeps_everything: ClassVar[bool] = True

    def reduce(self, image: VisualTokens) -> Reduction:
        b, n, _ = image.features.shape
        return Reduction.identity(n, b, image.features.device, grid=image.grid)


@register("random", paper="baseline")
@dataclass(frozen=True)
class Random(Method):
    """Keep tokens at random places, the same for every image of equal size: reproducible in any batch.

    Args:
        keep: tokens per image, or a share of them.
        seed: another seed, other places.

    Cost: O(N) time and memory; nothing of the image is read.
    """

    keep: Budget = 0.25
    seed: int = 0

    def reduce(self, image: VisualTokens) -> Reduction:
        places = torch.randperm(image.total, generator=torch.Generator().manual_seed(self.seed))
        places = places[: image.budget].to(image.features.device)
        return image.keep(places.expand(len(image.features), -1))


@register("uniform", paper="baseline")
@dataclass(frozen=True)
class Uniform(Method):
    """Keep every n-th token in raster order.

    Args:
        keep: tokens per image, or a share of them.

    Cost: O(K) time and memory; nothing of the image is read.
    """

    keep: Budget = 0.25

    def reduce(self, image: VisualTokens) -> Reduction:
        places = uniform(image.total, image.budget, image.features.device)
        return image.keep(places.expand(len(image.features), -1))


@register("pool", paper="baseline", needs=Needs(grid=True))
@dataclass(frozen=True)
class Pool(Method):
    """Average-pool the tokens on their 2-D grid, to the largest grid of at most ``keep`` cells.

    Any ratio works: a token on the border of two cells counts in both by its overlap.

    Args:
        keep: tokens per image, or a share of them.

    Cost: O(K·N) time and memory for the overlaps of cells and tokens; nothing of the image is read.
    """

    keep: Budget = 0.25

    def cells(self, grid: tuple[int, int], budget: int) -> tuple[int, int]:
        """Return (height, width) of the pooled grid."""
        return pooled_grid(grid, budget)

    def reduce(self, image: VisualTokens) -> Reduction:
        if image.grid is None:
            raise Refusal(f"{self.info.name} needs tokens on a grid; these {image.total} tokens have none")
        height, width = self.cells(image.grid, image.budget)
        b, device = len(image.features), image.features.device
        pooled = area_pool(image.grid, (height, width))
        anchors, slot, source, weight = (t.to(device).expand(b, -1) for t in pooled)
        note = f"{height}x{width} cells for a budget of {image.budget} tokens"
        return image.merge(anchors, slot, source, weight, note)


@register("downsample", paper="baseline", stage="encoder", needs=EncoderNeeds(grid=True))
@dataclass(frozen=True)
class Downsample(Pool, ResizeMethod):
    """Resize the image before the encoder, so that it makes fewer tokens: cheaper in the encoder, too.

    Args:
        keep: tokens per image, or a share of them.

    Cost: as ``pool``; the encoder then sees K tokens instead of N.
    """
