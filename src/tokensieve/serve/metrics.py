"""The server's metrics in the form of Prometheus, read from counters at each request for them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tokensieve import tally

SAVED = (
    "Estimate of the prefill time saved: measured seconds of prefill per prompt token, times the visual tokens "
    "dropped. Attention over a longer prompt costs more per token, so the estimate is low for long prompts."
)


@dataclass
class Requests:
    """Counts requests. Only the event loop writes it.

    Attributes:
        outcomes: {"answered", "rejected", "cancelled", "failed": number}.
        rejections: {reason: number}.
        receiving, waiting, running: requests whose body arrives, that wait for the engine, and that are in it.
        seconds: time in the engine of all answered requests.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    rejections: Counter[str] = field(default_factory=Counter)
    receiving: int = 0
    waiting: int = 0
    running: int = 0
    seconds: float = 0.0


class Prefill:
    """Sums the prompt tokens that the LLM received in prefills, and the seconds of these prefills."""

    def __init__(self) -> None:
        self._lock, self._tokens, self._seconds = threading.Lock(), 0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """Count one prefill."""
        with self._lock:
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds

    def sums(self) -> tuple[int, float]:
        """Return the tokens and the seconds."""
        with self._lock:
            return self._tokens, self._seconds


class ServerMetrics(Collector):
    """Turns the counters into metrics.

    Args:
        requests: the guard's counts.
        registry: the registry to stand in. Beside vLLM's own metrics, the time of prefills is read from those.
        prefill: sums that the embedded engine measures; ``None`` beside vLLM.
    """

    def __init__(self, requests: Requests, registry: CollectorRegistry, prefill: Prefill | None = None) -> None:
        self._requests, self._registry, self._prefill = requests, registry, prefill
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Return nothing: registering must not read the engine's metrics before they exist."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        images = CounterMetricFamily("tokensieve_images", "Images whose tokens a method received.", labels=["method"])
        before = CounterMetricFamily(
            "tokensieve_visual_tokens_before", "Visual tokens of these images.", labels=["method"]
        )
        after = CounterMetricFamily("tokensieve_visual_tokens_after", "Visual tokens that stayed.", labels=["method"])
        counts = tally.snapshot()
        for method, sums in counts.items():
            images.add_metric([method], sums.images)
            before.add_metric([method], sums.before)
            after.add_metric([method], sums.after)
        yield from (images, before, after)
        outcomes = CounterMetricFamily("tokensieve_requests", "Chat requests by their outcome.", labels=["outcome"])
        for name in ("answered", "rejected", "cancelled", "failed"):
            outcomes.add_metric([name], self._requests.outcomes[name])
        yield outcomes
        rejections = CounterMetricFamily("tokensieve_rejected", "Rejected requests by reason.", labels=["reason"])
        for reason, number in self._requests.rejections.items():
            rejections.add_metric([reason], number)
        yield rejections
        for name, meaning in (
            ("receiving", "Requests whose body arrives."),
            ("waiting", "Requests that wait for the engine."),
            ("running", "Requests in the engine."),
        ):
            yield GaugeMetricFamily(f"tokensieve_requests_{name}", meaning, value=getattr(self._requests, name))
        yield from self._times(sum(sums.before - sums.after for sums in counts.values()))

    def _times(self, dropped: int) -> Iterator[Metric]:
        if self._prefill is not None:
            tokens, seconds = self._prefill.sums()
            yield CounterMetricFamily("tokensieve_prefill_tokens", "Tokens that the LLM prefilled.", value=tokens)
            yield CounterMetricFamily("tokensieve_prefill_seconds", "Seconds of these prefills.", value=seconds)
        else:
            tokens = int(self._engines("vllm:prompt_tokens_total"))
            seconds = self._engines("vllm:request_prefill_time_seconds_sum")
        saved = seconds / tokens * dropped if tokens else 0.0
        yield GaugeMetricFamily("tokensieve_prefill_seconds_saved", SAVED, value=saved)

    def _engines(self, sample_name: str) -> float:
        """Return the sum of a metric of vLLM over its labels."""
        # a collector that is restricted to names does not call this one again, because its names are not described
        restricted = self._registry.restricted_registry([sample_name])
        return sum(
            sample.value for metric in restricted.collect() for sample in metric.samples if sample.name == sample_name
        )
