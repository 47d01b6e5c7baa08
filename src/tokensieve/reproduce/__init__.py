"""Run the published rows of papers again, under the papers' protocol: ``tokensieve reproduce``."""

from tokensieve.reproduce.published import Published, Target, find_target, published_rows
from tokensieve.reproduce.recipes import BENCHMARKS, MODELS, Benchmark, VisionModel

__all__ = [
    "BENCHMARKS",
    "MODELS",
    "Benchmark",
    "Published",
    "Target",
    "VisionModel",
    "find_target",
    "published_rows",
]
