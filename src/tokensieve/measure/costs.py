"""Cost and savings of each method on one batch of prompts, beside the unhooked model in the same rounds."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tokensieve.budget import BudgetScope
from tokensieve.engine import attach
from tokensieve.errors import Refusal
from tokensieve.loading import device_of, devices_of, to_model
from tokensieve.measure.busy import CpuReading, cpu_quota, read_cpu, timing_note, usable_cores
from tokensieve.measure.latency import Clock, Context, Spread, decode_stopwatch, in_rounds, stopwatch
from tokensieve.measure.paired import BreakEven, Rounds, Timing
from tokensieve.measure.resources import count_flops, kv_bytes, peak_activation_bytes
from tokensieve.methods import Method, Positions, Repair, parse
from tokensieve.models.layout import Separators
from tokensieve.reduction import Reduction

Decisions: TypeAlias = Sequence[Sequence[Reduction]]
Candidate: TypeAlias = str | Method | Sequence[Method] | Decisions


@dataclass(frozen=True)
class Cost:
    """Measurements of one method on one batch of prompts.

    All times of a session come from the same rounds, in which every candidate ran once. A method's time is the unhooked
    model's median time divided by the paired speedup, so that the figures of all rows agree with each other.

    Attributes:
        method: the spec, or "replay" for decisions given as they are, or "full" for the unhooked model.
        tokens_before, tokens_after: visual tokens per image, mean over the batch.
        prompts: size of the batch.
        prefill_ms: one forward of the prompts, vision encoder and method included, to the logits of the last token.
            The quartiles of a method are those of its speedup, those of the unhooked model are those of its rounds.
        prefill_speedup: unhooked time / time with the method, round by round.
        method_ms: the part of ``prefill_ms`` that a replay of the method's decisions does not need, from their ratio
            round by round. ``None`` where no replay does the same work (a method that acts in the vision encoder or the
            LLM, a replay itself) and for the unhooked model.
        decode_ms_per_token: time of each token of greedy generation after the first, for the whole batch. ``None`` for
            a model that does not generate.
        decode_speedup: unhooked time / time with the method, round by round.
        break_even: "at once", "after" some tokens, "never", or "not told apart", where quartiles lie on both sides of a
            speedup of 1, or where the answer's length decides. ``None`` for the unhooked model, and for a model that
            does not generate.
        break_even_tokens: tokens after the first from which on every longer answer is faster with the method: 0 where
            ``break_even`` is "at once", a number where it is "after", otherwise ``None``.
        break_even_low, break_even_high: the same at the better and at the worse quartiles of both speedups; ``None``
            where no number is large enough.
        flops: FLOPs of the prefill.
        flops_ratio: flops / flops of the unhooked prefill.
        peak_activation_bytes: peak during the prefill, the KV cache included.
        kv_bytes: bytes of the cache after the prefill; ``None`` for a model that does not generate.
        timing_note: the reason why the times of this session are uncertain, such as a busy machine.
    """

    method: str
    tokens_before: float
    tokens_after: float
    prompts: int
    prefill_ms: Spread
    prefill_speedup: Spread
    method_ms: Spread | None
    decode_ms_per_token: Spread | None
    decode_speedup: Spread | None
    break_even: BreakEven | None
    break_even_tokens: float | None
    break_even_low: float | None
    break_even_high: float | None
    flops: int
    flops_ratio: float
    peak_activation_bytes: int
    kv_bytes: int | None
    timing_note: str | None = None

    @property
    def prompts_per_second(self) -> float:
        """Prompts that are prefilled in a second, in batches of this size."""
        return 1e3 * self.prompts / self.prefill_ms.median

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens that are generated in a second after the first ones, over the whole batch."""
        return None if self.decode_ms_per_token is None else 1e3 * self.prompts / self.decode_ms_per_token.median

    def request_seconds(self, answer_tokens: int, requests: int = 1000) -> Spread:
        """Return the time of some requests, in batches of this size, with so many tokens after the first.

        The median follows from the medians of ``prefill_ms`` and ``decode_ms_per_token``; low and high follow from both
        lower and both upper quartiles, and are therefore rather too far apart than too close.
        """
        prefill, decode = self.prefill_ms, self.decode_ms_per_token or Spread(0.0, 0.0, 0.0)
        sums = (
            prefill.median + answer_tokens * decode.median,
            prefill.low + answer_tokens * decode.low,
            prefill.high + answer_tokens * decode.high,
        )
        return Spread(*(milliseconds * requests / self.prompts / 1e3 for milliseconds in sums))

    def __repr__(self) -> str:
        tokens = f"{self.tokens_after:.4g} of {self.tokens_before:.4g} tokens"
        decode = "" if self.decode_ms_per_token is None else f", {self.decode_ms_per_token} ms per token"
        speedup = f"prefill {self.prefill_ms} ms, {self.prefill_speedup}× as fast as full"
        return f"Cost({self.method}: {tokens}, {self.flops_ratio:.0%} of the FLOPs, {speedup}{decode})"

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
    models: Sequence[Any] | None = None,
    processor: Any = None,
    repeats: int = 10,
    warmup: int = 2,
    decode_tokens: int = 8,
    budget_scope: BudgetScope = "image",
    separators: Separators = "kept-lines",
    positions: Positions = "original",
    repair: Repair | None = None,
    clock: Clock = time.perf_counter,
    read: Callable[[], CpuReading] = read_cpu,
) -> list[Cost]:
    """Measure the unhooked model (first in the list, as "full") and each method, all in the same rounds.

    A round times every candidate once: the unhooked model, each method, and a replay of its decisions. Prefill and
    decoding have their own rounds, and every second round runs backwards.

    Args:
        model: a vision-language model with nothing attached.
        inputs: the processor's tensors for one batch of left-padded prompts; they are moved to the model's device.
        methods: specs, methods, lists of methods (stages in order), or decisions to replay, as for ``attach``.
        models: for each method the model that it runs on, such as ``model`` fine-tuned; by default ``model``. All rows
            are paired with ``model``.
        processor, budget_scope, separators, positions, repair: as for ``attach``.
        repeats, warmup: timed rounds, and untimed rounds before them.
        decode_tokens: tokens generated to time decoding, after the first.
        clock, read: the clock of the rounds, and the CPU time that shows a busy machine.

    Raises:
        Refusal: unknown method or parameter, a method that this model cannot run, or no round to time.
    """
    if repeats < 1 or decode_tokens < 1:
        raise Refusal(f"repeats and decode_tokens must be at least 1; got {repeats} and {decode_tokens}")
    prompts = {id(host): _Prompts(host, inputs) for host in (model, *(models or ()))}
    hosts = [prompts[id(host)] for host in models or [model] * len(methods)]
    scope: dict[str, Any] = {
        "budget_scope": budget_scope,
        "separators": separators,
        "positions": positions,
        "repair": repair,
    }
    options = {"processor": processor, **scope}
    full = _Contender.unhooked(prompts[id(model)])
    contenders = [full, *(_Contender.of(m, host, options) for m, host in zip(methods, hosts, strict=True))]
    start = read()
    rounds = _time(contenders, repeats, warmup, decode_tokens, clock)
    on_cpu = device_of(model).type == "cpu"
    note = timing_note(
        start,
        read(),
        Spread.of(rounds[0].prefill),
        rounds=repeats,
        threads=torch.get_num_threads() if on_cpu else 1,
        cores=len(usable_cores()),
        quota=cpu_quota(),
        on_cpu=on_cpu,
    )
    timings = [Timing.of_full(rounds[0]), *(Timing.of_method(rounds[0], own_rounds) for own_rounds in rounds[1:])]
    return [contender.cost(timing, full.flops, note) for contender, timing in zip(contenders, timings, strict=True)]


def prefill_flops(
    model: Any,
    inputs: Mapping[str, Tensor],
    method: str | Sequence[Method],
    *,
    processor: Any = None,
    budget_scope: BudgetScope = "image",
    separators: Separators = "kept-lines",
    positions: Positions = "original",
    repair: Repair | None = None,
) -> int:
    """Count the FLOPs of one prefill with a method; arguments as for :func:`measure_costs`, which times it, too."""
    prompts = _Prompts(model, inputs)
    if method == "full":
        return count_flops(prompts.prefill)
    scope: dict[str, Any] = {
        "budget_scope": budget_scope,
        "separators": separators,
        "positions": positions,
        "repair": repair,
    }
    with attach(model, method, processor=processor, **scope):
        return count_flops(prompts.prefill)


class _Prompts:
    """One batch of prompts on one model.

    Attributes:
        inputs: tensors for ``generate``, on the model's device and in its dtype.
        generates: whether the model generates text; otherwise it chooses among answers.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Tensor]) -> None:
        self.model = model
        self.inputs = to_model(model, inputs)
        self.generates = model.can_generate()
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        cached = {"use_cache": True} if self.generates else {}
        self._options: dict[str, Any] = {**cached, **({"logits_to_keep": 1} if last_only else {})}

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])

    def prefill(self) -> Any:
        """Run one forward to the logits of the last token."""
        with torch.inference_mode():
            return self.model(**self.inputs, **self._options)


@dataclass(frozen=True)
class _Contender:
    """One row: a method on a batch of prompts, counted; its times are still to be measured.

    Attributes:
        attached: attaches the method; nothing for the unhooked model.
        replay: attaches the method's decisions, which leaves out the cost of the selection alone.
        tokens: visual tokens per image before and after.
        flops, peak_bytes, cache_bytes: of the prefill.
    """

    method: str
    prompts: _Prompts
    attached: Context
    replay: Context | None
    tokens: tuple[float, float]
    flops: int
    peak_bytes: int
    cache_bytes: int | None

    @classmethod
    def unhooked(cls, prompts: _Prompts) -> _Contender:
        """Count the unhooked model."""
        with attach(prompts.model, "full") as sieve:
            prompts.prefill()
            tokens = _tokens(sieve.last)
        return cls("full", prompts, nullcontext, None, tokens, *_count(prompts, prompts.prefill()))

    @classmethod
    def of(cls, method: Candidate, prompts: _Prompts, options: dict[str, Any]) -> _Contender:
        """Count a method."""
        stages: Any = parse(method) if isinstance(method, str) else [method] if isinstance(method, Method) else method
        attached = partial(attach, prompts.model, stages, **options)
        with attached() as sieve:
            output = prompts.prefill()
            decisions = sieve.last
            counts = _count(prompts, output)
        replay = partial(attach, prompts.model, decisions) if _replayable(stages) else None
        name = method if isinstance(method, str) else _name(stages)
        return cls(name, prompts, attached, replay, _tokens(decisions), *counts)

    def cost(self, timing: Timing, full_flops: int, note: str | None) -> Cost:
        """Join the counts with the times."""
        before, after = self.tokens
        return Cost(
            method=self.method,
            tokens_before=before,
            tokens_after=after,
            prompts=len(self.prompts),
            **vars(timing),
            flops=self.flops,
            flops_ratio=self.flops / full_flops,
            peak_activation_bytes=self.peak_bytes,
            kv_bytes=self.cache_bytes,
            timing_note=note,
        )


def _count(prompts: _Prompts, output: Any) -> tuple[int, int, int | None]:
    """Return FLOPs, peak bytes and cache bytes of a prefill with what is attached now; ``output`` is that of one."""
    cache_bytes = kv_bytes(output.past_key_values) if prompts.generates else None
    return count_flops(prompts.prefill), peak_activation_bytes(prompts.prefill, device_of(prompts.model)), cache_bytes


def _time(
    contenders: Sequence[_Contender], repeats: int, warmup: int, decode_tokens: int, clock: Clock
) -> list[Rounds]:
    """Time the prefill and the decoding of all contenders, each in rounds that all of them share."""
    calls = [(c.prompts, context) for c in contenders for context in (c.attached, c.replay) if context is not None]
    stopwatches = [
        stopwatch(prompts.prefill, context, devices=devices_of(prompts.model), clock=clock)
        for prompts, context in calls
    ]
    prefills = iter(in_rounds(stopwatches, repeats=repeats, warmup=warmup))
    decodes: list[list[float]] | list[None] = [None] * len(contenders)
    if contenders[0].prompts.generates:
        stopwatches = [
            decode_stopwatch(c.prompts.model, c.prompts.inputs, c.attached, tokens=decode_tokens, clock=clock)
            for c in contenders
        ]
        decodes = in_rounds(stopwatches, repeats=repeats, warmup=min(1, warmup))
    return [
        Rounds(next(prefills), decode, replay=next(prefills) if contender.replay else None)
        for contender, decode in zip(contenders, decodes, strict=True)
    ]


def _name(stages: Sequence[Any]) -> str:
    return " + ".join(map(str, stages)) if isinstance(stages[0], Method) else "replay"


def _replayable(stages: Sequence[Any]) -> bool:
    """Return whether a replay does the method's work without its selection: only methods at the connector do."""
    return all(isinstance(stage, Method) and stage.info.stage == "connector" for stage in stages)


def _tokens(decisions: Decisions) -> tuple[float, float]:
    """Return the mean visual tokens per image before and after the reduction."""
    images = [image for sample in decisions for image in sample]
    return sum(i.total for i in images) / len(images), sum(i.slots for i in images) / len(images)
