"""Answer questions in batches, with a method attached."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tokensieve.engine import Sieve, attach
from tokensieve.engine.fusion.families import longest_text
from tokensieve.errors import DataError, Refusal, first_line
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Answer
from tokensieve.evaluate.plan import Settings
from tokensieve.evaluate.prompt import (
    Inputs,
    added_by_turns,
    continued,
    decode,
    encode,
    encode_pairs,
    first_turn,
    generate_arguments,
    image_numbers,
    later_tokens,
    without_repetitions,
)
from tokensieve.evaluate.results import Skipped
from tokensieve.loading import device_of, to_model
from tokensieve.methods import Positions
from tokensieve.models import TokenLayout
from tokensieve.reduction import Reduction

CACHE_BYTES = 2**30  # processed batches that are kept for the next method
AUTO, LARGEST = 16, 256  # batch_size="auto": the first batch, and the largest that is tried

Attached = Callable[[Sequence[Sample]], Sieve]
"""Attaches a method for one batch."""


@dataclass(frozen=True)
class Batch:
    """Outcome of one batch.

    Attributes:
        size: the largest batch that fits into memory, as far as it is known.
        answers: of its samples, in their order.
        skipped: samples whose image cannot be read, by key.
        failure: why its other samples have no answer; they are given up.
    """

    size: int
    answers: Sequence[Answer] = ()
    skipped: Mapping[str, Skipped] = field(default_factory=dict)
    failure: str = ""


class Answerer:
    """One model and a data set, batched.

    Args:
        model, processor, samples: as for :func:`tokensieve.evaluate.compare`.
        settings: the prompt, the batch size and the length of an answer are used.
        keys: {sample id: key in the journal}.
        examples: ids of the samples whose decisions are recorded.

    Attributes:
        size: questions in the next batch.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Sequence[Sample],
        settings: Settings,
        keys: Mapping[str, str],
        examples: AbstractSet[str] = frozenset(),
    ) -> None:
        self.model, self.processor, self.settings, self.examples = model, processor, settings, examples
        self.samples, self.keys = in_order(samples), keys
        automatic = settings.batch_size == "auto"
        self.size = AUTO if settings.batch_size == "auto" else settings.batch_size
        # on a CPU larger batches are not faster, and the system ends a process that takes too much memory
        self._grows = automatic and device_of(model).type != "cpu"
        self._inputs: dict[tuple[str, ...], Inputs] = {}
        self._cached_bytes = 0

    def finished(self, answers: Mapping[str, Answer]) -> set[str]:
        """Return the keys of the samples that need no new answer. An example also needs its recorded decision."""
        example_keys = {self.keys[name] for name in self.examples}
        return {
            key
            for key in self.keys.values()
            if key in answers and (key not in example_keys or answers[key].reduction is not None)
        }

    def run(
        self,
        attached: Attached,
        done: AbstractSet[str],
        skipped: Mapping[str, Skipped],
        rank: int = 0,
        count: int = 1,
    ) -> Iterator[Batch]:
        """Answer the samples whose keys are not in ``done`` or ``skipped``, and yield the outcome of each batch.

        Args:
            attached: attaches the method.
            done, skipped: keys. Samples of damaged images may be added to ``skipped`` on the way.
            rank, count: of ``count`` processes with equal arguments, each answers every ``count``-th batch. All yield
                equally often, and call :meth:`adapt` with the sizes of all before the next batch.
        """

        def unanswered(samples: Sequence[Sample]) -> bool:
            keys = (self.keys[sample.id] for sample in samples)
            return any(key not in done and key not in skipped for key in keys)

        start = 0
        while start < len(self.samples):
            size, stop = self.size, start + count * self.size
            if unanswered(self.samples[start:stop]):
                first = start + rank * size
                batch = self.samples[first : first + size]
                # a batch is answered whole, also where some of its answers are known: a run that was interrupted
                # then forms the same batches as one that was not
                readable = [sample for sample in batch if self.keys[sample.id] not in skipped]
                yield self._batch(readable, attached) if unanswered(batch) else Batch(size)
            start = stop

    def adapt(self, sizes: Sequence[int]) -> None:
        """Choose the size of the next batch from the sizes that fitted in all processes."""
        fitting = min(sizes)
        if fitting < self.size:
            warnings.warn(
                f"a batch of {self.size} questions does not fit into memory; continuing with {fitting}", stacklevel=1
            )
            self.size, self._grows = fitting, False
        elif self._grows:
            self.size = min(2 * self.size, LARGEST)

    def inputs(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return the processor's tensors for some samples, on the model's device and in its dtype."""
        return to_model(self.model, self.encode(samples))

    def encode(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return the processor's tensors for some samples."""
        return encode(self.processor, samples, prompt=self.settings.prompt)

    def texts(self, inputs: Inputs) -> list[str]:
        """Return the model's answers to one batch."""
        arguments, greedy = generate_arguments(self.model, inputs), {"do_sample": False, "num_beams": 1}
        if inputs.later is not None:
            # the method decides on the first turn; its cache then lacks what the method dropped
            first = self.model.generate(**arguments, **greedy, max_new_tokens=1, return_dict_in_generate=True)
            arguments = continued(inputs, first.past_key_values)
        generated = self.model.generate(**arguments, **greedy, max_new_tokens=self.settings.max_new_tokens)
        return decode(self.processor, generated, arguments["input_ids"].shape[1])

    def _batch(self, batch: Sequence[Sample], attached: Attached) -> Batch:
        """Answer a batch, without samples that cannot be read, and in parts where it does not fit into memory."""
        answers: list[Answer] = []
        skipped: dict[str, Skipped] = {}
        fitting = part_size = self.size
        remaining, failure = list(batch), ""
        while remaining and not failure:
            part = remaining[:part_size]
            try:
                answers += self._answer(part, attached)
                remaining = remaining[len(part) :]
                continue
            except Refusal as error:
                damaged = self._damaged(part) if isinstance(error, DataError) else {}
                reason, memory = str(error), False
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                damaged, reason, memory = {}, f"one question alone does not fit into memory ({first_line(error)})", True
            # outside the handlers: their tracebacks hold the tensors of the batch
            if memory:
                self._free()
            if damaged:
                skipped |= {self.keys[name]: entry for name, entry in damaged.items()}
                remaining = [sample for sample in remaining if sample.id not in damaged]
            elif len(part) == 1:
                place = part[0].where or f"question {part[0].id}"
                failure = f"{place}: {reason.removeprefix(f'{place}: ')}"
            elif memory:
                fitting = part_size = len(part) // 2
            else:
                part_size = 1  # to find the sample, and to keep the answers of the others
        return Batch(fitting, answers, skipped, failure)

    def _free(self) -> None:
        self._inputs.clear()
        self._cached_bytes = 0
        gc.collect()
        torch.cuda.empty_cache()

    def _answer(self, batch: Sequence[Sample], attached: Attached) -> list[Answer]:
        answers: dict[str, Answer] = {}
        for group in self._alike(batch):
            inputs = self._batch_inputs(group)
            with attached(group) as sieve, torch.inference_mode():
                texts = self.texts(inputs)
            rows = zip(group, texts, sieve.last, sieve.tokens, strict=True)
            answers |= {sample.id: self._record(sample, text, images, tokens) for sample, text, images, tokens in rows}
        return [answers[sample.id] for sample in batch]

    def _alike(self, batch: Sequence[Sample]) -> list[Sequence[Sample]]:
        """Return the batch in groups whose later turns add equally many tokens, so that no padding lies between."""
        if not any(sample.turns for sample in batch):
            return [batch]
        groups: dict[int, list[Sample]] = {}
        added = added_by_turns(self.encode([first_turn(sample) for sample in batch]), self.encode(batch))
        for sample, number in zip(batch, added, strict=True):
            groups.setdefault(number, []).append(sample)
        return list(groups.values())

    def _record(self, sample: Sample, text: str, images: list[Reduction], tokens: list[list[int]]) -> Answer:
        reduction, average = together(images), average_tokens(tokens)
        recorded = reduction.to_json() if sample.id in self.examples else None
        return Answer(self.keys[sample.id], text, reduction.total, reduction.slots, average, reduction.grid, recorded)

    def _batch_inputs(self, batch: Sequence[Sample]) -> Inputs:
        name = tuple(sample.id for sample in batch)
        if name in self._inputs:
            return self._inputs[name]
        try:
            inputs = self._shared(self.inputs([first_turn(sample) for sample in batch]), image_numbers(batch))
            if batch[0].turns:
                inputs = replace(inputs, later=later_tokens(inputs.tensors, self.inputs(batch)))
        except Exception as error:  # processors raise many types at images of a shape that they do not expect
            if isinstance(error, Refusal) or is_out_of_memory(error) or not self._damaged(batch):
                raise
            raise DataError(first_line(error)) from error
        if self._cached_bytes + inputs.nbytes <= CACHE_BYTES:
            self._inputs[name] = inputs
            self._cached_bytes += inputs.nbytes
        return inputs

    def _damaged(self, batch: Sequence[Sample]) -> dict[str, Skipped]:
        """Return the samples with an image that cannot be read, or that the processor takes with another image only."""
        damaged = unreadable(batch)
        plain = partial(Image.new, "RGB", (224, 224))
        for sample in batch:
            if sample.id not in damaged:
                try:
                    self.encode([sample])
                except Exception as error:
                    try:
                        self.encode([replace(sample, image=(plain,) * len(sample.images))])
                    except Exception:  # the image is not the cause
                        continue
                    damaged[sample.id] = _skipped(sample, f"the processor refuses the image ({first_line(error)})")
        return damaged

    def _shared(self, tensors: dict[str, torch.Tensor], images: list[int]) -> Inputs:
        return without_repetitions(self.model, tensors, images)


class Classifier(Answerer):
    """One model that chooses among the answers it knows, in one forward."""

    def texts(self, inputs: Inputs) -> list[str]:
        names, logits = self.model.config.id2label, self.model(**inputs.tensors).logits
        return [names[number] for number in logits.argmax(-1).tolist()]

    def encode(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        longest = longest_text(self.model.config)
        return encode_pairs(self.processor, samples, prompt=self.settings.prompt, longest=longest)

    def _shared(self, tensors: dict[str, torch.Tensor], images: list[int]) -> Inputs:
        return Inputs(tensors, None)


def answerer_class(model: Any) -> type[Answerer]:
    """Return the class that answers with a model: it generates answers, or it chooses among those it knows."""
    return Answerer if model.can_generate() else Classifier


def together(images: Sequence[Reduction]) -> Reduction:
    """Join the decisions about one sample: it has several images, or the model takes each tile of one for an image."""
    return TokenLayout(sum(reduction.total for reduction in images)).merge_parts(images)


def average_tokens(tokens: Sequence[Sequence[int]]) -> float:
    """Return a sample's visual tokens, those of all its images, averaged over the LLM's layers.

    Args:
        tokens: `[image][layer]`, as in ``sieve.tokens[sample]``.
    """
    return sum(map(sum, tokens)) / len(tokens[0])


def in_order(samples: Sequence[Sample]) -> list[Sample]:
    """Order samples for batches: questions about one image side by side, images sorted by their longest question."""
    longest: dict[Any, int] = {}
    for sample in samples:
        longest[sample.image] = max(longest.get(sample.image, 0), len(sample.question))
    # equal lengths need little padding; the image's number keeps its questions together where lengths tie
    numbers = {image: i for i, image in enumerate(longest)}
    return sorted(samples, key=lambda sample: (longest[sample.image], numbers[sample.image]))


def unreadable(samples: Sequence[Sample]) -> dict[str, Skipped]:
    """Return the samples with an image that cannot be read, by id; their errors name no folder of the machine."""
    skipped = {}
    for sample in samples:
        try:
            sample.open_all()
        except DataError as error:
            skipped[sample.id] = _skipped(sample, str(error).removeprefix(sample.error_prefix))
    return skipped


def _skipped(sample: Sample, reason: str) -> Skipped:
    file, comma, line = sample.where.rpartition(", ")
    reason = reason.replace(f"{Path(file).parent}{os.sep}", "") if file else reason
    return Skipped(sample.id, f"{Path(file).name}{comma}{line}", reason)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, on a GPU or a CPU. On a CPU, torch's error is recognised by its text."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory"))


def attaching(model: Any, stages: Sequence[Any], processor: Any, **options: Any) -> Attached:
    """Attach the same methods for every batch; ``options`` as for ``attach``."""
    return lambda batch: attach(model, stages, processor=processor, **options)


def replaying(model: Any, decide: Callable[[Sample], list[Reduction]], positions: Positions) -> Attached:
    """Attach a given decision for every image of every sample."""
    return lambda batch: attach(model, [decide(sample) for sample in batch], positions=positions)
