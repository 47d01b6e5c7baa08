"""Answer questions in batches, with a method attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch

from tokensieve.budget import BudgetScope
from tokensieve.engine import Sieve, attach
from tokensieve.engine.fusion.families import longest_text
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Answer
from tokensieve.evaluate.plan import Settings
from tokensieve.evaluate.prompt import (
    Inputs,
    decode,
    encode,
    encode_pairs,
    generate_arguments,
    image_numbers,
    to_model,
    without_repetitions,
)
from tokensieve.evaluate.provenance import sample_key
from tokensieve.models import TokenLayout
from tokensieve.reduction import Reduction

CACHE_BYTES = 2**30  # processed batches that are kept for the next method

Attached = Callable[[Sequence[Sample]], Sieve]
"""Attaches a method for one batch."""


class Answerer:
    """One model and a data set, batched.

    Args:
        model, processor, samples: as for :func:`tokensieve.evaluate.compare`.
        settings: the prompt, the batch size and the length of an answer are used.
        examples: ids of the samples whose decisions are recorded.

    Attributes:
        keys: {sample id: key in the journal}.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Sequence[Sample],
        settings: Settings,
        examples: AbstractSet[str] = frozenset(),
    ) -> None:
        self.model, self.processor, self.settings, self.examples = model, processor, settings, examples
        self.keys = {sample.id: sample_key(sample) for sample in samples}
        self.batches = batches(samples, settings.batch_size)
        self._inputs: dict[int, Inputs] = {}
        self._cached_bytes = 0

    def finished(self, answers: Mapping[str, Answer]) -> set[str]:
        """Return the keys of the samples that need no new answer. An example also needs its recorded decision."""
        example_keys = {self.keys[name] for name in self.examples}
        return {
            key
            for key in self.keys.values()
            if key in answers and (key not in example_keys or answers[key].reduction is not None)
        }

    def by_id(self, answers: Mapping[str, Answer]) -> dict[str, Answer]:
        """Return the answers of a run by sample id instead of by journal key."""
        return {name: answers[key] for name, key in self.keys.items()}

    def run(self, attached: Attached, done: AbstractSet[str]) -> Iterator[list[Answer]]:
        """Yield the answers of each batch that holds a sample whose key is not in ``done``."""
        for number, batch in enumerate(self.batches):
            if any(self.keys[sample.id] not in done for sample in batch):
                yield self._answer(number, batch, attached)

    def inputs(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return the processor's tensors for some samples, on the model's device and in its dtype."""
        return to_model(self.model, self.encode(samples))

    def encode(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return the processor's tensors for some samples."""
        return encode(self.processor, samples, prompt=self.settings.prompt)

    def texts(self, inputs: Inputs) -> list[str]:
        """Return the model's answers to one batch."""
        generated = self.model.generate(
            **generate_arguments(self.model, inputs),
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.settings.max_new_tokens,
        )
        return decode(self.processor, generated, inputs.tensors["input_ids"].shape[1])

    def _answer(self, number: int, batch: Sequence[Sample], attached: Attached) -> list[Answer]:
        inputs = self._batch_inputs(number, batch)
        with attached(batch) as sieve, torch.inference_mode():
            texts = self.texts(inputs)
        return [self._record(*row) for row in zip(batch, texts, sieve.last, sieve.tokens, strict=True)]

    def _record(self, sample: Sample, text: str, images: list[Reduction], tokens: list[list[int]]) -> Answer:
        # tokens: [image][layer]; a sample's tokens in a layer are those of all its images
        reduction, per_layer = together(images), [sum(counts) for counts in zip(*tokens, strict=True)]
        average = sum(per_layer) / len(per_layer)
        recorded = reduction.to_json() if sample.id in self.examples else None
        return Answer(self.keys[sample.id], text, reduction.total, reduction.slots, average, reduction.grid, recorded)

    def _batch_inputs(self, number: int, batch: Sequence[Sample]) -> Inputs:
        if number in self._inputs:
            return self._inputs[number]
        inputs = self._shared(self.inputs(batch), image_numbers(batch))
        if self._cached_bytes + inputs.nbytes <= CACHE_BYTES:
            self._inputs[number] = inputs
            self._cached_bytes += inputs.nbytes
        return inputs

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


def together(images: Sequence[Reduction]) -> Reduction:
    """Join the decisions about one sample: it has several images, or the model takes each tile of one for an image."""
    return TokenLayout(sum(reduction.total for reduction in images)).merge_parts(images)


def batches(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Batch the samples: questions about one image side by side, images sorted by their longest question."""
    longest: dict[Any, int] = {}
    for sample in samples:
        longest[sample.image] = max(longest.get(sample.image, 0), len(sample.question))
    # equal lengths need little padding; the image's number keeps its questions together where lengths tie
    numbers = {image: i for i, image in enumerate(longest)}
    ordered = sorted(samples, key=lambda sample: (longest[sample.image], numbers[sample.image]))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def attaching(model: Any, stages: Sequence[Any], processor: Any, scope: BudgetScope = "image") -> Attached:
    """Attach the same methods for every batch."""
    return lambda batch: attach(model, stages, processor=processor, budget_scope=scope)


def replaying(model: Any, decide: Callable[[Sample], Reduction]) -> Attached:
    """Attach a given decision for every sample."""
    return lambda batch: attach(model, [[decide(sample)] for sample in batch])
