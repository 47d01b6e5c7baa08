"""Pure tensor maths of token reduction: torch in, torch out. Every function accepts leading batch dimensions."""

from tokensieve.ops.cluster import density_peaks
from tokensieve.ops.match import bipartite_match, first_of_each, keep_best
from tokensieve.ops.merge import area_pool, keep_and_average, pooled_grid
from tokensieve.ops.score import attention, epsilon_attention, mask_bias, normalise, text_relevance, text_similarity
from tokensieve.ops.select import knee, max_min, top_k, top_k_per_group, uniform
from tokensieve.ops.transport import carried

__all__ = [
    "area_pool",
    "attention",
    "bipartite_match",
    "carried",
    "density_peaks",
    "epsilon_attention",
    "first_of_each",
    "keep_and_average",
    "keep_best",
    "knee",
    "mask_bias",
    "max_min",
    "normalise",
    "pooled_grid",
    "text_relevance",
    "text_similarity",
    "top_k",
    "top_k_per_group",
    "uniform",
]
