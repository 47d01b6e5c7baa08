"""Answer questions in batches, with a method attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from tokensieve.budget import Scope
from tokensieve.engine import Sieve, attach
from tokensieve.engine.fusion.families import longest_text
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.journal import Answer
from tokensieve.evaluate.prompt import Inputs, decode, encode, encode_pairs, encoded, without_repetitions
from tokensieve.evaluate.provenance import sample_key
from tokensieve.models import TokenLayout
from tokensieve.reduction import Reduction

CACHE_BYTES = 2**30  # processed batches kept for the next method

Attached = Callable[[Sequence[Sample]], Sieve]
"""Attaches a method for one batch."""


class Answerer:
    """A model, a data set, and how prompts are made of it.

    Args:
        model, processor: as for ``compare``.
        samples: the data set.
        prompt, batch_size, max_new_tokens: as for ``compare``.
        examples: ids of the samples whose decisions are recorded.

    Attributes:
        keys: {sample id: key in the journal}.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Sequence[Sample],
        *,
        prompt: str,
        batch_size: int,
        max_new_tokens: int,
        examples: set[str],
    ) -> None:
        self.model, self.processor, self.prompt, self.max_new_tokens = model, processor, prompt, max_new_tokens
        self.keys, self.examples = {sample.id: sample_key(sample) for sample in samples}, examples
        self.batches = batches(samples, batch_size)
        self._inputs: dict[int, Inputs] = {}
        self._held = 0

    def finished(self, answers: Mapping[str, Answer]) -> set[str]:
        """Keys of the samples that need no answer: the examples' count only with their decision."""
        shown = {self.keys[name] for name in self.examples}
        return {
            key
            for key in self.keys.values()
            if key in answers and (key not in shown or answers[key].reduction is not None)
        }

    def by_id(self, answers: Mapping[str, Answer]) -> dict[str, Answer]:
        """The answers of a run by sample id."""
        return {name: answers[key] for name, key in self.keys.items()}

    def run(self, attached: Attached, done: set[str]) -> Iterator[list[Answer]]:
        """Answers to the samples whose key is not in ``done``, batch by batch."""
        for number, batch in enumerate(self.batches):
            if any(self.keys[sample.id] not in done for sample in batch):
                yield self._answer(number, batch, attached)

    def inputs(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """The processor's tensors for some samples, on the model's device."""
        made = self.encode(samples)
        floats = {name: tensor for name, tensor in made.items() if tensor.is_floating_point()}
        made |= {name: tensor.to(self.model.dtype) for name, tensor in floats.items()}
        return {name: tensor.to(self.model.device) for name, tensor in made.items()}

    def encode(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """What the processor makes of some samples."""
        return encode(self.processor, samples, prompt=self.prompt)

    def _answer(self, number: int, batch: Sequence[Sample], attached: Attached) -> list[Answer]:
        inputs = self._batch_inputs(number, batch)
        with attached(batch) as sieve, torch.inference_mode():
            texts = self.texts(inputs)
        return [self._record(*row) for row in zip(batch, texts, sieve.last, sieve.tokens, strict=True)]

    def texts(self, inputs: Inputs) -> list[str]:
        """What the model says to a batch."""
        generated = self.model.generate(
            **encoded(self.model, inputs), do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens
        )
        return decode(self.processor, generated, inputs.tensors["input_ids"].shape[1])

    def _record(self, sample: Sample, text: str, images: list[Reduction], tokens: list[list[int]]) -> Answer:
        reduction, blocks = together(images), [sum(seen) for seen in zip(*tokens, strict=True)]
        average = sum(blocks) / len(blocks)
        recorded = reduction.to_json() if sample.id in self.examples else None
        return Answer(self.keys[sample.id], text, reduction.total, reduction.slots, average, reduction.grid, recorded)

    def _batch_inputs(self, number: int, batch: Sequence[Sample]) -> Inputs:
        if number in self._inputs:
            return self._inputs[number]
        images = {image: i for i, image in enumerate(dict.fromkeys(sample.image for sample in batch))}
        inputs = self._shared(self.inputs(batch), [images[sample.image] for sample in batch])
        if self._held + inputs.nbytes <= CACHE_BYTES:
            self._inputs[number], self._held = inputs, self._held + inputs.nbytes
        return inputs

    def _shared(self, tensors: dict[str, torch.Tensor], images: list[int]) -> Inputs:
        return without_repetitions(self.model, tensors, images)


class Classifier(Answerer):
    """Answers of a model that chooses among those it knows, in one forward."""

    def texts(self, inputs: Inputs) -> list[str]:
        names, logits = self.model.config.id2label, self.model(**inputs.tensors).logits
        return [names[number] for number in logits.argmax(-1).tolist()]

    def encode(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return encode_pairs(self.processor, samples, prompt=self.prompt, longest=longest_text(self.model.config))

    def _shared(self, tensors: dict[str, torch.Tensor], images: list[int]) -> Inputs:
        return Inputs(tensors, None)


def together(images: Sequence[Reduction]) -> Reduction:
    """One decision about all that the model took for images of a sample: where tiles are images, there are several."""
    return TokenLayout(sum(reduction.total for reduction in images)).merge_parts(images)


def batches(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Batches of samples: the questions about one image together, images with questions of similar length together."""
    longest: dict[Any, int] = {}
    for sample in samples:
        longest[sample.image] = max(longest.get(sample.image, 0), len(sample.question))
    images = {image: i for i, image in enumerate(longest)}
    ordered = sorted(samples, key=lambda sample: (longest[sample.image], images[sample.image]))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def attaching(model: Any, stages: Sequence[Any], processor: Any, scope: Scope = "image") -> Attached:
    """The same methods for every batch."""
    return lambda batch: attach(model, stages, processor=processor, budget_scope=scope)


def replaying(model: Any, decide: Callable[[Sample], Reduction]) -> Attached:
    """A given decision for every sample."""
    return lambda batch: attach(model, [[decide(sample)] for sample in batch])
