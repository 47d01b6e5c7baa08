"""Cost of a call: exact FLOPs, peak activation memory, KV cache bytes and paired, interleaved latency."""

from tokensieve.measure.busy import CpuReading, cpu_quota, crowd_note, read_cpu, timing_note, usable_cores
from tokensieve.measure.costs import Candidate, Cost, measure_costs, prefill_flops
from tokensieve.measure.latency import Spread, interleave, paired_ratio, ratio_digits, two_digits
from tokensieve.measure.paired import BreakEven, Rounds, Timing, break_even
from tokensieve.measure.resources import count_flops, kv_bytes, peak_activation_bytes

__all__ = [
    "BreakEven",
    "Candidate",
    "Cost",
    "CpuReading",
    "Rounds",
    "Spread",
    "Timing",
    "break_even",
    "count_flops",
    "cpu_quota",
    "crowd_note",
    "interleave",
    "kv_bytes",
    "measure_costs",
    "paired_ratio",
    "peak_activation_bytes",
    "prefill_flops",
    "ratio_digits",
    "read_cpu",
    "timing_note",
    "two_digits",
    "usable_cores",
]
