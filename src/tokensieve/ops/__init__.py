"""Pure tensor maths of token reduction: torch in, torch out. Every function accepts leading batch dimensions."""

from tokensieve.ops.cluster import density_peaks
from tokensieve.ops.merge import area_pool, keep_and_average, pooled_grid
from tokensieve.ops.score import normalise, text_similarity
from tokensieve.ops.select import knee, max_min, top_k, top_k_per_group, uniform
from tokensieve.ops.transport import carried

__all__ = [
    "area_pool",
    "carried",
    "density_peaks",
    "keep_and_average",
    "knee",
    "max_min",
    "normalise",
    "pooled_grid",
    "text_similarity",
    "top_k",
    "top_k_per_group",
    "uniform",
]
