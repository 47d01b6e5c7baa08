"""Pure tensor maths of token reduction: torch in, torch out. Every function accepts leading batch dimensions."""

from tokensieve.ops.match import bipartite_match, first_of_each, keep_best
from tokensieve.ops.merge import area_pool, pooled_grid
from tokensieve.ops.score import attention, epsilon_attention, mask_bias, normalise, text_relevance, text_similarity
from tokensieve.ops.select import max_min, top_k, uniform

__all__ = [
    "area_pool",
    "attention",
    "bipartite_match",
    "epsilon_attention",
    "first_of_each",
    "keep_best",
    "mask_bias",
    "max_min",
    "normalise",
    "pooled_grid",
    "text_relevance",
    "text_similarity",
    "top_k",
    "uniform",
]
