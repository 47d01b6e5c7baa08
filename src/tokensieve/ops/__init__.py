"""Pure tensor maths of token reduction: torch in, torch out. Every function accepts leading batch dimensions."""

from tokensieve.ops.cluster import connected, density_peaks, join_nearest, peak_scores
from tokensieve.ops.greedy import coverage, dpp_map, max_min, rows_at
from tokensieve.ops.match import alternate_match, bipartite_match, first_of_each, keep_best
from tokensieve.ops.merge import area_pool, keep_and_average, nearest, pooled_grid, sizes_of
from tokensieve.ops.score import (
    CHUNK,
    attention,
    epsilon_attention,
    local_variance,
    mask_bias,
    normalise,
    text_relevance,
    text_similarity,
    without_sinks,
)
from tokensieve.ops.select import (
    at,
    bipartite_thinning,
    knee,
    marked,
    outliers,
    rank_in_group,
    share_out,
    spread_evenly,
    top_k,
    top_k_per_group,
    uniform,
)
from tokensieve.ops.transport import carried

__all__ = [
    "CHUNK",
    "alternate_match",
    "area_pool",
    "at",
    "attention",
    "bipartite_match",
    "bipartite_thinning",
    "carried",
    "connected",
    "coverage",
    "density_peaks",
    "dpp_map",
    "epsilon_attention",
    "first_of_each",
    "join_nearest",
    "keep_and_average",
    "keep_best",
    "knee",
    "local_variance",
    "marked",
    "mask_bias",
    "max_min",
    "nearest",
    "normalise",
    "outliers",
    "peak_scores",
    "pooled_grid",
    "rank_in_group",
    "rows_at",
    "share_out",
    "sizes_of",
    "spread_evenly",
    "text_relevance",
    "text_similarity",
    "top_k",
    "top_k_per_group",
    "uniform",
    "without_sinks",
]
