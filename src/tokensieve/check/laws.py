"""The laws on a live model: what must hold whatever a method drops, with the deviation that was measured.

1. identity: keeping all changes no bit of the logits, and neither does a method after it is detached.
2. oracle: a reduced run equals the unmodified model with the dropped tokens hidden (:mod:`~tokensieve.check.oracle`).
3. batch: every row of a ragged batch equals its own run.
4. continuation: a second turn on the returned cache equals that of the oracle.
5. conservation: every visual token is kept, merged into a known slot, or dropped.
6. cache: the KV cache holds as many columns as the counts say.

Deviations are in logits. Two runs that must be equal are computed in different shapes, so they differ by rounding; how
much is measured: the unmodified model's prompts in a batch against each by itself. ``MARGIN`` times that is allowed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tokensieve.budget import Scope
from tokensieve.check.oracle import dropped_columns, hidden, merged
from tokensieve.engine import Sieve, attach
from tokensieve.engine.decoder.masks import SLIDING, kinds_of
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, Method, parse
from tokensieve.reduction import Reduction

Status: TypeAlias = Literal["pass", "FAIL", "refused", "skipped"]
Prompts: TypeAlias = Callable[[Sequence[int]], Mapping[str, Tensor]]
Decisions: TypeAlias = list[list[Reduction]]
LAWS = ("identity", "oracle", "batch", "continuation", "conservation", "cache")
STEPS = 6
MARGIN = 8


@dataclass(frozen=True)
class Verdict:
    """What one law says of one method.

    Attributes:
        deviation: largest difference of a logit; ``None`` where the law is not about logits or was not run.
        allowed: the largest that passes.
        reason: why it was refused or skipped, what is broken, or a remark.
    """

    method: str
    law: str
    status: Status
    deviation: float | None = None
    allowed: float | None = None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Run:
    """Greedy steps of one batch.

    Attributes:
        logits: `[B, steps, vocabulary]`, float32, as the model gave them.
        tokens: `[B, steps]`.
        held: columns in the cache of each block afterwards; 0 where a block has no such cache.
    """

    inputs: Mapping[str, Tensor]
    logits: Tensor
    tokens: Tensor
    cache: Any
    held: list[int]


class LawViolated(Exception):
    """A law is broken, and not by a deviation of logits."""


class NotCheckable(Exception):
    """A law cannot be checked here; says why."""


class Laws:
    """The laws on one model and a few prompts. What the unmodified model does is computed once.

    Args:
        model: in eval mode, nothing attached.
        prompts: gives the left-padded inputs of the prompts with these numbers, on the model's device. The prompts
            differ in length; one of them shows several images, if the model takes several.
        count: how many prompts there are.
        processor, budget_scope: as for ``attach``.

    Attributes:
        floor: what rounding alone does to a logit.
        allowed: the largest deviation that counts as rounding.
    """

    def __init__(
        self, model: Any, prompts: Prompts, count: int = 3, processor: Any = None, budget_scope: Scope = "image"
    ) -> None:
        self.model, self.token = model, int(model.config.image_token_id)
        self.processor, self.scope = processor, budget_scope
        self.together, self.alone = prompts(range(count)), [prompts([i]) for i in range(count)]
        self.whole = self.generate(self.together)
        self.precision = torch.finfo(next(model.parameters()).dtype).eps
        own = [_deviation(_row(self.whole, i), self.generate(inputs)) for i, inputs in enumerate(self.alone)]
        self.floor = max(self.precision * float(self.whole.logits.abs().max()), *own)
        self.allowed = MARGIN * self.floor

    def check(self, method: str | Sequence[Method], **parameters: Any) -> Iterator[Verdict]:
        """One verdict per law, as it falls.

        Args:
            method: a spec or stages, as for ``attach``.
            parameters: values for parameters that a spec leaves open.

        Raises:
            ValueError: an unknown method or parameter.
        """
        stages = parse(method, **parameters) if isinstance(method, str) else list(method)
        name = " + ".join(map(str, stages))
        try:
            trial = _Trial(self, stages)
        except Exception as error:  # what is no refusal has broken every law
            refused = isinstance(error, Refusal)
            for law in LAWS:
                yield Verdict(name, law, "refused", reason=str(error)) if refused else _broken(name, law, error)
            return
        for law in LAWS:
            yield self._verdict(name, law, getattr(trial, law))

    def _verdict(self, name: str, law: str, holds: Callable[[], tuple[float | None, str]]) -> Verdict:
        try:
            deviation, remark = holds()
        except NotCheckable as why:
            return Verdict(name, law, "skipped", reason=str(why))
        except Exception as error:  # whatever goes wrong in here would go wrong for a user
            return _broken(name, law, error)
        if deviation is None:
            return Verdict(name, law, "pass", reason=remark)
        allowed = 0.0 if law == "identity" else self.allowed
        return Verdict(name, law, "pass" if deviation <= allowed else "FAIL", deviation, allowed, remark)

    def generate(self, inputs: Mapping[str, Tensor], **more: Any) -> Run:
        """``STEPS`` greedy steps, none of them a placeholder."""
        placeholders = [self.token, getattr(self.model.config, "video_token_id", None)]
        with torch.inference_mode():
            out = self.model.generate(
                **inputs,
                **more,
                max_new_tokens=STEPS,
                min_new_tokens=STEPS,
                do_sample=False,
                num_beams=1,
                suppress_tokens=[i for i in placeholders if i is not None],
                return_dict_in_generate=True,
                output_logits=True,
            )
        held = [layer.keys.shape[-2] if hasattr(layer, "keys") else 0 for layer in out.past_key_values.layers]
        return Run(inputs, torch.stack(out.logits, 1).float(), out.sequences[:, -STEPS:], out.past_key_values, held)


class _Trial:
    """One method on the prompts of ``laws``: every law is a method that gives its deviation, if any, and a remark."""

    def __init__(self, laws: Laws, stages: list[Method]) -> None:
        self.laws, self.stages = laws, stages
        with self._attached(stages) as sieve:
            self.reduced = laws.generate(laws.together)
            self.decisions, self.counts = sieve.last, sieve.tokens
            self.second = self._second_turn(self.reduced)

    def identity(self) -> tuple[float, str]:
        laws = self.laws
        worst, remark = _deviation(laws.generate(laws.together), laws.whole), "after detach() only: it has no budget"
        everything = [_keeping_all(stage) for stage in self.stages]
        if None not in everything:
            remark = ""
            with self._attached([stage for stage in everything if stage is not None]) as sieve:
                worst = max(worst, _deviation(laws.generate(laws.together), laws.whole))
                if not all(image.whole for row in sieve.last for image in row):
                    raise LawViolated("with a budget of all tokens it keeps fewer")
        return worst, remark

    def oracle(self) -> tuple[float, str]:
        with self._hidden():
            return _deviation(self.reduced, self.laws.generate(self.laws.together)), ""

    def batch(self) -> tuple[float, str]:
        worst, remarks = 0.0, []
        for i, inputs in enumerate(self.laws.alone):
            with self._attached(self.stages) as sieve:
                own = self.laws.generate(inputs)
                alike = _agreement(sieve.last[0], self.decisions[i])
            if alike < 1:
                self._by_rounding(alike)
                remarks.append(f"{1 - alike:.0%} of the tokens of prompt {i} are chosen otherwise, by rounding")
                with attach(self.laws.model, [self.decisions[i]]):
                    own = self.laws.generate(inputs)
            worst = max(worst, _deviation(_row(self.reduced, i), own))
        return worst, "; ".join(remarks)

    def continuation(self) -> tuple[float, str]:
        with self._hidden():
            oracle = self._second_turn(self.laws.generate(self.laws.together))
        if not torch.equal(oracle.inputs["input_ids"], self.second.inputs["input_ids"]):
            raise NotCheckable("the first answers part at a tie")
        return _deviation(self.second, oracle), ""

    def conservation(self) -> tuple[None, str]:
        shown = (self.laws.together["input_ids"] == self.laws.token).sum(-1).tolist()
        for row, (images, placeholders) in enumerate(zip(self.decisions, shown, strict=True)):
            if sum(image.total for image in images) != placeholders:
                raise LawViolated(f"prompt {row} shows {placeholders} visual tokens; the decisions are about others")
            for image in images:
                _conserve(image)
        return None, ""

    def cache(self) -> tuple[None, str]:
        shown = (self.laws.together["input_ids"] == self.laws.token).sum(-1).tolist()
        lengths = self.laws.together["attention_mask"].sum(-1).tolist()
        for block, (layer, held) in enumerate(zip(self.reduced.cache.layers, self.reduced.held, strict=True)):
            if held == 0 or getattr(layer, "is_sliding", False):
                continue
            left = [sum(image[block] for image in row) for row in self.counts]
            rows = zip(lengths, shown, left, strict=True)
            expected = max(length - before + after for length, before, after in rows) + STEPS - 1
            if held != expected:
                raise LawViolated(f"block {block} caches {held} columns; {expected} are left")
        return None, ""

    # -- parts --------------------------------------------------------------------------------------------------------

    def _attached(self, stages: Sequence[Method]) -> Sieve:
        laws = self.laws
        return attach(laws.model, list(stages), processor=laws.processor, budget_scope=laws.scope)

    def _second_turn(self, first: Run) -> Run:
        """The answer read backwards is the next question, on the cache of the first turn."""
        added = torch.cat([first.tokens, first.tokens.flip(1)], 1)
        inputs = {"input_ids": torch.cat([first.inputs["input_ids"], added], 1)}
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            if name in first.inputs:
                given = first.inputs[name]
                inputs[name] = torch.cat([given, torch.full_like(added, value, dtype=given.dtype)], 1)
        return self.laws.generate(inputs, past_key_values=first.cache)

    @contextmanager
    def _hidden(self) -> Iterator[None]:
        """The oracle of this method: the unmodified model, in which what was dropped cannot be seen."""
        laws, text = self.laws, self.laws.model.config.get_text_config()
        ids, kinds = laws.together["input_ids"], kinds_of(text)
        if any("linear" in kind for kind in kinds):
            raise NotCheckable("linear attention has no mask to hide a token with")
        inside = self.stages[-1] if isinstance(self.stages[-1], DecoderMethod) else None
        before = len(self.stages) > (inside is not None)  # what leaves inside the LLM counts in its windows anyway
        if before and SLIDING in kinds and text.sliding_window < ids.shape[1] + 3 * STEPS:
            raise NotCheckable("hidden tokens would count in this model's sliding window")
        entered = self.decisions if inside is None else self._entered()
        if any(stage.info.stage == "encoder" for stage in self.stages):
            raise NotCheckable("the encoder itself sees another image")
        if not all(image.projected for row in entered for image in row):
            raise NotCheckable("it merges before the projector")
        with ExitStack() as stack:
            stack.enter_context(merged(laws.model, entered))
            stack.enter_context(hidden(laws.model, dropped_columns(ids, laws.token, entered)))
            if inside is not None:
                blocks = inside.stages(text.num_hidden_layers)
                if len(blocks) > 1 or any(r.mixing is not None for row in self.decisions for r in row):
                    raise NotCheckable("tokens leave this LLM at several blocks, or merge in it")
                gone = dropped_columns(ids, laws.token, self.decisions)
                stack.enter_context(hidden(laws.model, gone, blocks[0]))
            yield

    def _entered(self) -> Decisions:
        """What a method before the one inside the LLM decided."""
        if len(self.stages) == 1:
            return [[Reduction.identity(r.total, device=r.anchors.device) for r in row] for row in self.decisions]
        with self._attached(self.stages[:-1]) as sieve:
            self.laws.generate(self.laws.together)
            return sieve.last

    def _by_rounding(self, alike: float) -> None:
        """A row of a batch may choose other tokens than its own run only where rounding is coarse."""
        if self.laws.precision < 1e-4:
            raise LawViolated(f"a row of the batch chooses {1 - alike:.0%} other tokens than its own run")
        if any(stage.info.stage != "connector" for stage in self.stages):
            raise NotCheckable("by rounding it chooses other tokens in a batch")


def _keeping_all(stage: Method) -> Method | None:
    """The same method with a budget that keeps everything; ``None`` for one without a budget."""
    names = {field.name for field in dataclasses.fields(stage)}
    if "keep" not in names:
        return None
    everything: dict[str, Any] = {"keep": 1.0, **{name: None for name in ("average", "counts") if name in names}}
    return dataclasses.replace(stage, **everything)


def _row(run: Run, i: int) -> Run:
    return dataclasses.replace(run, logits=run.logits[i : i + 1], tokens=run.tokens[i : i + 1])


def _deviation(a: Run, b: Run) -> float:
    """Largest difference of two runs' logits, step by step as long as both rows say the same."""
    alike = (a.tokens == b.tokens).cumprod(-1).roll(1, -1)
    alike[:, 0] = 1  # a step's logits come from the tokens before it
    apart = (a.logits - b.logits).abs().masked_fill(a.logits == b.logits, 0)  # a model may mask ids: both are -inf
    return float((apart.amax(-1) * alike).max())


def _agreement(own: Sequence[Reduction], other: Sequence[Reduction]) -> float:
    """Share of kept tokens that two lists of decisions have in common."""
    pairs = [(set(a.kept.tolist()), set(b.kept.tolist())) for a, b in zip(own, other, strict=True)]
    kept = sum(max(len(a), len(b)) for a, b in pairs)
    return sum(len(a & b) for a, b in pairs) / kept if kept else 1.0


def _conserve(image: Reduction) -> None:
    """Law 5 for one image.

    Raises:
        LawViolated: naming what is not accounted for.
    """
    source, anchors, slots = image.source.tolist(), image.anchors.tolist(), image.slots
    if sorted(set(anchors)) != anchors or not set(anchors) <= set(range(image.total)):
        raise LawViolated("anchors are not distinct, ascending places of visual tokens")
    if len(source) != image.total or not set(source) <= set(range(-1, slots)):
        raise LawViolated("a visual token is neither in a slot nor dropped")
    if image.mixing is None and [i for i, slot in enumerate(source) if slot >= 0] != anchors:
        raise LawViolated("a token that was dropped is listed as kept")
    if bool((image.counts < 1).any()) or not torch.equal((image.matrix() != 0).sum(-1), image.counts):
        raise LawViolated("slots do not count the visual tokens that went into them")


def _broken(name: str, law: str, error: Exception) -> Verdict:
    first = next(iter(str(error).splitlines()), "")
    reason = first if isinstance(error, LawViolated) else f"{type(error).__name__}: {first}"
    return Verdict(name, law, "FAIL", reason=reason)
