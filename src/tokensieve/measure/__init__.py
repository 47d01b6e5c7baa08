"""Cost of a call: exact FLOPs, peak activation memory, KV cache bytes and paired, interleaved latency."""

from tokensieve.measure.costs import Bench, Cost, measure_costs
from tokensieve.measure.latency import Spread, interleave, paired_difference, paired_ratio
from tokensieve.measure.resources import count_flops, kv_bytes, peak_activation_bytes

__all__ = [
    "Bench",
    "Cost",
    "Spread",
    "count_flops",
    "interleave",
    "kv_bytes",
    "measure_costs",
    "paired_difference",
    "paired_ratio",
    "peak_activation_bytes",
]
