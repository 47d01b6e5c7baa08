"""Pure tensor maths of token reduction: torch in, torch out. Every function accepts leading batch dimensions."""

from tokensieve.ops.merge import area_pool, pooled_grid
from tokensieve.ops.score import normalise, text_similarity
from tokensieve.ops.select import max_min, top_k, uniform

__all__ = ["area_pool", "max_min", "normalise", "pooled_grid", "text_similarity", "top_k", "uniform"]
