"""Cost and savings of each method on one batch of prompts, beside the unhooked model in the same process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tokensieve.budget import BudgetScope
from tokensieve.engine import attach
from tokensieve.measure.latency import Spread, decode_ms, interleave, paired_difference, paired_ratio
from tokensieve.measure.resources import count_flops, kv_bytes, peak_activation_bytes
from tokensieve.methods import Method, parse
from tokensieve.reduction import Reduction

Decisions: TypeAlias = Sequence[Sequence[Reduction]]
Candidate: TypeAlias = str | Method | Sequence[Method] | Decisions
Contexts: TypeAlias = Sequence[Callable[[], AbstractContextManager[Any]]]


@dataclass(frozen=True)
class Cost:
    """Measurements of one method on one batch of prompts.

    Attributes:
        method: the spec, or "replay" for decisions given as they are, or "full" for the unhooked model.
        tokens_before, tokens_after: visual tokens per image, mean over the batch.
        prefill_ms: one forward of the prompts, vision encoder and method included, to the logits of the last token.
        prefill_speedup: unhooked time / time with the method, pair by pair.
        method_ms: time with the method - time with a replay of its decisions. ``None`` where no replay does the same
            work (a method that acts in the vision encoder or the LLM, a replay itself) and for the unhooked model.
        decode_ms_per_token: time of each further token of greedy generation, for the whole batch. ``None`` for a
            model that does not generate.
        flops: FLOPs of the prefill.
        flops_ratio: flops / flops of the unhooked prefill.
        peak_activation_bytes: peak during the prefill, the KV cache included.
        kv_bytes: bytes of the cache after the prefill; ``None`` for a model that does not generate.
        break_even_tokens: generated tokens after which the saved time exceeds the extra prefill time: 0 where the
            prefill is as fast as the unhooked one, ``None`` where it never does.
    """

    method: str
    tokens_before: float
    tokens_after: float
    prefill_ms: Spread
    prefill_speedup: Spread
    method_ms: Spread | None
    decode_ms_per_token: Spread | None
    flops: int
    flops_ratio: float
    peak_activation_bytes: int
    kv_bytes: int | None
    break_even_tokens: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers; a :class:`Spread` becomes ``{"median", "low", "high"}``."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cost:
        """Invert :meth:`to_json`."""
        spreads = {key: Spread(**value) for key, value in data.items() if isinstance(value, dict)}
        return cls(**{**data, **spreads})


def measure_costs(
    model: Any,
    inputs: Mapping[str, Tensor],
    methods: Sequence[Candidate],
    *,
    processor: Any = None,
    repeats: int = 10,
    warmup: int = 2,
    decode_tokens: int = 8,
    budget_scope: BudgetScope = "image",
) -> list[Cost]:
    """Measure the unhooked model (first in the list, as "full") and then each method, paired with it.

    Args:
        model: a vision-language model with nothing attached.
        inputs: the processor's tensors for one batch of left-padded prompts, on the model's device.
        methods: specs, methods, lists of methods (stages in order), or decisions to replay, as for ``attach``.
        processor, budget_scope: as for ``attach``.
        repeats, warmup: timed rounds, and untimed rounds before them, of full, method and replay in turn.
        decode_tokens: tokens generated to time decoding.

    Raises:
        Refusal: unknown method or parameter, or a method that this model cannot run.
    """
    options = {"repeats": repeats, "warmup": warmup, "decode_tokens": decode_tokens}
    bench = Bench(model, inputs, processor=processor, budget_scope=budget_scope, **options)
    return [bench.full, *(bench.cost(method) for method in methods)]


class Bench:
    """One batch of prompts on one model. Arguments as for :func:`measure_costs`.

    Attributes:
        full: the cost of the unhooked model, measured on creation.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        *,
        processor: Any = None,
        repeats: int = 10,
        warmup: int = 2,
        decode_tokens: int = 8,
        budget_scope: BudgetScope = "image",
    ) -> None:
        self.model, self.inputs, self.processor, self.scope = model, inputs, processor, budget_scope
        self.repeats, self.warmup, self.decode_tokens = repeats, warmup, decode_tokens
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._generates = model.can_generate()
        cached = {"use_cache": True} if self._generates else {}
        self._prompt = {**inputs, **cached, **({"logits_to_keep": 1} if last_only else {})}
        self.full = self._full()

    def _full(self) -> Cost:
        with attach(self.model, "full") as sieve:
            self._prefill()
            tokens, _ = _tokens(sieve.last)
        (times,), (gap,) = self._times([nullcontext]), self._gaps([nullcontext])
        return Cost(
            method="full",
            tokens_before=tokens,
            tokens_after=tokens,
            prefill_ms=Spread.of(times),
            prefill_speedup=Spread(1.0, 1.0, 1.0),
            method_ms=None,
            decode_ms_per_token=gap,
            flops=count_flops(self._prefill),
            flops_ratio=1.0,
            peak_activation_bytes=peak_activation_bytes(self._prefill, self.model.device),
            kv_bytes=self._kv_bytes(self._prefill()),
            break_even_tokens=0.0,
        )

    def cost(self, method: Candidate) -> Cost:
        """Measure the unhooked model, the method and a replay of its decisions, interleaved."""
        stages: Any = parse(method) if isinstance(method, str) else [method] if isinstance(method, Method) else method
        attached = partial(attach, self.model, stages, processor=self.processor, budget_scope=self.scope)
        with attached() as sieve:
            kv = self._kv_bytes(self._prefill())
            decisions = sieve.last
            flops = count_flops(self._prefill)
            peak = peak_activation_bytes(self._prefill, self.model.device)
        runs: Contexts = [nullcontext, attached]
        if _replayable(stages):  # the difference to a replay is the cost of the selection alone
            runs = [*runs, partial(attach, self.model, decisions)]
        full, times, *replay = self._times(runs)
        full_gap, gap = self._gaps(runs[:2])
        before, after = _tokens(decisions)
        saved_per_token = full_gap.median - gap.median if full_gap and gap else 0.0
        return Cost(
            method=method if isinstance(method, str) else _name(stages),
            tokens_before=before,
            tokens_after=after,
            prefill_ms=Spread.of(times),
            prefill_speedup=paired_ratio(full, times),
            method_ms=paired_difference(times, replay[0]) if replay else None,
            decode_ms_per_token=gap,
            flops=flops,
            flops_ratio=flops / self.full.flops,
            peak_activation_bytes=peak,
            kv_bytes=kv,
            break_even_tokens=break_even(paired_difference(times, full).median, saved_per_token),
        )

    def _prefill(self) -> Any:
        with torch.inference_mode():
            return self.model(**self._prompt)

    def _times(self, around: Contexts) -> list[list[float]]:
        calls = [self._prefill] * len(around)
        return interleave(calls, around=around, repeats=self.repeats, warmup=self.warmup, device=self.model.device)

    def _gaps(self, around: Contexts) -> list[Spread | None]:
        """Return the time per generated token, ``None`` for a model that does not generate."""
        if not self._generates:
            return [None] * len(around)
        return [Spread.of(gaps) for gaps in decode_ms(self.model, self.inputs, around, self.decode_tokens)]

    def _kv_bytes(self, output: Any) -> int | None:
        return kv_bytes(output.past_key_values) if self._generates else None


def _name(stages: Sequence[Any]) -> str:
    return " + ".join(map(str, stages)) if isinstance(stages[0], Method) else "replay"


def _replayable(stages: Sequence[Any]) -> bool:
    """Return whether a replay does the method's work without its selection: only methods at the connector do."""
    return all(isinstance(stage, Method) and stage.info.stage == "connector" for stage in stages)


def _tokens(decisions: Decisions) -> tuple[float, float]:
    """Return the mean visual tokens per image before and after the reduction."""
    images = [image for sample in decisions for image in sample]
    return sum(i.total for i in images) / len(images), sum(i.slots for i in images) / len(images)


def break_even(extra_prefill_ms: float, saved_ms_per_token: float) -> float | None:
    """Return the generated tokens that save the extra prefill time: 0 if there is none, ``None`` if no number does."""
    if extra_prefill_ms <= 0:
        return 0.0
    return extra_prefill_ms / saved_ms_per_token if saved_ms_per_token > 0 else None
