"""One method on the prompts of the laws: each law is one method of :class:`Trial`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tokensieve.budget import rule_of
from tokensieve.check.oracle import copied, dropped_columns, hidden, merged, stand_ins
from tokensieve.check.runs import STEPS, Generated, Runs, deviation, row_of
from tokensieve.engine import Sieve, attach
from tokensieve.engine.decoder.masks import SLIDING, attention_kinds
from tokensieve.engine.llm import LlmSieve
from tokensieve.methods import DecoderMethod, Method
from tokensieve.methods.compute import ComputeMethod
from tokensieve.methods.skip import SkipMethod
from tokensieve.reduction import Reduction

Decisions: TypeAlias = list[list[Reduction]]


class LawViolated(Exception):
    """A law is broken by something else than a deviation of logits."""


class NotCheckable(Exception):
    """A law cannot be checked on this model or method; the message is the reason."""


class Trial:
    """One method on the prompts of ``laws``. Each law is a method that returns its deviation, if any, and a remark."""

    def __init__(self, laws: Runs, stages: list[Method]) -> None:
        self.laws, self.stages = laws, stages
        with self._attached(stages) as sieve:
            self.reduced = laws.generate(laws.batch)
            self.decisions, self.tokens_per_layer = sieve.last, sieve.tokens
            self.sizes = getattr(sieve, "sizes", [])
            self.second = self._second_turn(self.reduced)

    def identity(self) -> tuple[float, str]:
        laws = self.laws
        worst, remark = deviation(laws.generate(laws.batch), laws.unreduced), "after detach() only: it has no budget"
        whole_stages = [_keeping_all(stage) for stage in self.stages]
        if None not in whole_stages:
            remark = ""
            with self._attached([stage for stage in whole_stages if stage is not None]) as sieve:
                worst = max(worst, deviation(laws.generate(laws.batch), laws.unreduced))
                if not all(image.whole for row in sieve.last for image in row):
                    raise LawViolated("with a budget of all tokens it keeps fewer")
        return worst, remark

    def oracle(self) -> tuple[float, str]:
        with self._hidden():
            return deviation(self.reduced, self.laws.generate(self.laws.batch)), ""

    def batch(self) -> tuple[float, str]:
        worst, remarks = 0.0, []
        for i, inputs in enumerate(self.laws.singles):
            with self._attached(self.stages) as sieve:
                single = self.laws.generate(inputs)
                agreement = _agreement(sieve.last[0], self.decisions[i])
            if agreement < 1:
                self._check_rounding(agreement)
                remarks.append(f"{1 - agreement:.0%} of the tokens of prompt {i} are chosen otherwise, by rounding")
                # compare logits under equal decisions: replay those of the batch
                with attach(self.laws.model, [self.decisions[i]], repair=self.laws.repair):
                    single = self.laws.generate(inputs)
            worst = max(worst, deviation(row_of(self.reduced, i), single))
        return worst, "; ".join(remarks)

    def continuation(self) -> tuple[float, str]:
        if self.laws.reselect:
            with self._attached(self.stages):
                fresh = self.laws.generate({**self.laws.batch, **self.second.inputs})
            return deviation(self.second, fresh), ""
        with self._hidden():
            oracle = self._second_turn(self.laws.generate(self.laws.batch))
        if not torch.equal(oracle.inputs["input_ids"], self.second.inputs["input_ids"]):
            raise NotCheckable("the first answers part at a tie")
        return deviation(self.second, oracle), ""

    def conservation(self) -> tuple[None, str]:
        for row, (images, placeholders) in enumerate(zip(self.decisions, self._placeholders(), strict=True)):
            if sum(image.total for image in images) != placeholders:
                raise LawViolated(f"prompt {row} has {placeholders} visual tokens; the decisions cover another number")
            for image in images:
                _conserve(image)
        return None, ""

    def cache(self) -> tuple[None, str]:
        lengths = self.laws.batch["attention_mask"].sum(-1).tolist()
        inside = self.stages[-1]
        shortened = isinstance(inside, DecoderMethod) and inside.leaves_caches  # to what enters the last layer
        for number, (layer, columns) in enumerate(zip(self.reduced.cache.layers, self.reduced.columns, strict=True)):
            if columns == 0 or getattr(layer, "is_sliding", False):
                continue
            kept = [sum(image[-1 if shortened else number] for image in row) for row in self.tokens_per_layer]
            rows = zip(lengths, self._placeholders(), kept, strict=True)
            # the longest row sets the width; the last generated token is not in the cache yet
            expected = max(length - before + after for length, before, after in rows) + STEPS - 1
            if columns != expected:
                raise LawViolated(f"layer {number} caches {columns} columns; {expected} are left")
        return None, ""

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _placeholders(self) -> list[int]:
        """Return the number of placeholders of each prompt of the batch."""
        counts: list[int] = (self.laws.batch["input_ids"] == self.laws.token).sum(-1).tolist()
        return counts

    def _attached(self, stages: Sequence[Method]) -> Sieve:
        laws = self.laws
        return attach(laws.model, list(stages), processor=laws.processor, **laws.options)

    def _second_turn(self, first: Generated) -> Generated:
        """Generate again on the cache of the first turn; the next question is the first answer, reversed."""
        added = torch.cat([first.tokens, first.tokens.flip(1)], 1)
        inputs = {"input_ids": torch.cat([first.inputs["input_ids"], added], 1)}
        for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            if name in first.inputs:
                before = first.inputs[name]
                inputs[name] = torch.cat([before, torch.full_like(added, value, dtype=before.dtype)], 1)
        return self.laws.generate(inputs, past_key_values=first.cache)

    @contextmanager
    def _hidden(self) -> Iterator[None]:
        """Run the oracle of this method inside: the unmodified model with the dropped tokens hidden.

        Raises:
            NotCheckable: hiding a token is not the same as dropping it on this model or for this method.
        """
        laws, text_config = self.laws, self.laws.model.config.get_text_config()
        ids, kinds = laws.batch["input_ids"], attention_kinds(text_config)
        for kind in kinds:  # they mix tokens whatever the mask
            if any(name in kind for name in ("linear", "conv", "hybrid")):
                name = "linear attention" if "linear" in kind else "a layer of convolution"
                raise NotCheckable(f"{name} has no mask to hide a token with")
        if any(image.added for row in self.decisions for image in row):
            raise NotCheckable("no other run has its registers")
        if any(stage.changes_text for stage in self.stages):
            raise NotCheckable("in no other run is the text changed")
        if isinstance(self.stages[-1], SkipMethod):
            raise NotCheckable("in no other run do tokens skip a layer and return")
        if isinstance(self.stages[-1], ComputeMethod):
            raise NotCheckable("no other run does less work on visual rows")
        inside = self.stages[-1] if isinstance(self.stages[-1], DecoderMethod) else None
        # tokens dropped inside the LLM count in its windows in a reduced run, too: they are no obstacle
        drops_before = len(self.stages) > (inside is not None)
        if drops_before and SLIDING in kinds and text_config.sliding_window < ids.shape[1] + 3 * STEPS:
            raise NotCheckable("hidden tokens would count in this model's sliding window")
        if laws.repair == "restore":
            raise NotCheckable("no other run has the bias of distance that repair='restore' adds")
        at_entry, sizes = (self.decisions, self.sizes) if inside is None else self._decisions_at_entry()
        if any(stage.info.stage == "encoder" for stage in self.stages):
            raise NotCheckable("it changes the image inside the vision encoder")
        if not all(image.projected for row in at_entry for image in row):
            raise NotCheckable("it merges before the projector")
        with ExitStack() as stack:
            stack.enter_context(merged(laws.model, at_entry))
            self._replace(stack, at_entry, sizes, 0)
            if inside is not None:
                layers = inside.layer_numbers(text_config.num_hidden_layers)
                if len(layers) > 1 or any(r.mixing is not None for row in self.decisions for r in row):
                    raise NotCheckable("tokens leave this LLM at several layers, or merge in it")
                self._replace(stack, self.decisions, self.sizes, layers[0], inside.leaves_caches)
            yield

    def _replace(
        self, stack: ExitStack, decisions: Decisions, sizes: list[list[Tensor]], layer: int, caches: bool = False
    ) -> None:
        """Hide the dropped tokens from a layer on; under ``repair="size"``, let them show the tokens kept for them.

        Args:
            caches: they leave the caches of the layers before, too.
        """
        model, ids, token = self.laws.model, self.laws.batch["input_ids"], self.laws.token
        columns = dropped_columns(ids, token, decisions)
        if self.laws.repair is not None:
            if any(bool(((part - part.round()).abs() > 1e-3).any()) for row in sizes for part in row):
                raise NotCheckable("it shares a token out over several, so no number of copies has their sizes")
            shown = stand_ins(ids, token, decisions, sizes)
            stack.enter_context(copied(model, shown, layer))
            columns &= shown == torch.arange(ids.shape[1], device=ids.device)
        stack.enter_context(hidden(model, columns, layer, caches))

    def _decisions_at_entry(self) -> tuple[Decisions, list[list[Tensor]]]:
        """Return decisions and sizes before the LLM, made by the stages before the one inside it."""
        if len(self.stages) == 1:
            whole = [[Reduction.identity(r.total, device=r.anchors.device) for r in row] for row in self.decisions]
            return whole, [[image.counts for image in row] for row in whole]
        if any((rule := rule_of(stage.budget)) and rule.mean == "layers" for stage in self.stages):
            # a budget that is an average over the layers is another one without the stage inside the LLM
            if self.laws.repair is not None:
                raise NotCheckable("the sizes of the tokens that enter the LLM are not known with keep='layers:…'")
            with self._attached(self.stages) as sieve:
                self.laws.generate(self.laws.batch)
                return sieve.entered if isinstance(sieve, LlmSieve) else sieve.last, []
        with self._attached(self.stages[:-1]) as sieve:
            self.laws.generate(self.laws.batch)
            return sieve.last, getattr(sieve, "sizes", [])

    def _check_rounding(self, agreement: float) -> None:
        """Accept that a row of a batch chooses other tokens than its own run only where rounding is coarse."""
        if self.laws.precision < 1e-4:
            raise LawViolated(f"a row of the batch chooses {1 - agreement:.0%} other tokens than its own run")
        if any(stage.info.stage != "connector" for stage in self.stages):
            raise NotCheckable("by rounding it chooses other tokens in a batch")


def _keeping_all(stage: Method) -> Method | None:
    """Return the same method with a budget that keeps all tokens; ``None`` if it has no budget."""
    names = {field.name for field in dataclasses.fields(stage)}
    if "keep" not in names:
        return None
    budgets: dict[str, Any] = {"keep": 1.0, **{name: None for name in ("average", "counts") if name in names}}
    return dataclasses.replace(stage, **budgets)


def _agreement(decisions: Sequence[Reduction], others: Sequence[Reduction]) -> float:
    """Return the share of kept tokens that two lists of decisions have in common."""
    pairs = [(set(a.kept.tolist()), set(b.kept.tolist())) for a, b in zip(decisions, others, strict=True)]
    kept = sum(max(len(a), len(b)) for a, b in pairs)
    return sum(len(a & b) for a, b in pairs) / kept if kept else 1.0


def _conserve(image: Reduction) -> None:
    """Check law 5 for one image.

    Raises:
        LawViolated: naming the inconsistency.
    """
    source, anchors, slots = image.source.tolist(), image.anchors.tolist(), image.slots
    if sorted(set(anchors)) != anchors or not set(anchors) <= set(range(image.total)):
        raise LawViolated("anchors are not distinct, ascending places of visual tokens")
    if len(source) != image.total or not set(source) <= set(range(-1, slots)):
        raise LawViolated("a visual token is neither in a slot nor dropped")
    if image.mixing is None and [i for i, slot in enumerate(source) if slot >= 0] != anchors:
        raise LawViolated("a token that was dropped is listed as kept")
    if bool((image.counts < 1).any()) or not torch.equal((image.matrix() != 0).sum(-1), image.counts):
        raise LawViolated("slots do not count the visual tokens that are merged into them")
