"""Questions with answers to train on: their order, their batches, and the labels of the answers."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokensieve.errors import DataError, Refusal
from tokensieve.evaluate.data import Sample, reference_samples, sample_of
from tokensieve.evaluate.pictures import Picture, content_key
from tokensieve.evaluate.prompt import chat_messages, check_texts, image_numbers, left_padded_batch, user_turns
from tokensieve.evaluate.records import read_records

log = logging.getLogger(__name__)
REFERENCE, SCENES = "reference:", 2000  # the bundled questions, and the number of scenes without a slice
COLUMNS = ("image", "question", "answer")
SHOWN = 5  # records that cannot be used are named up to this number, and counted beyond it
IGNORED = -100  # label of a column that is not predicted


def read_samples(source: str) -> tuple[list[Sample], int]:
    """Read questions with answers; return them, and the number of records that cannot be used, which are logged.

    Args:
        source: a file as for ``tokensieve compare``; ``name:split`` of the datasets library; ``reference:train`` or
            ``reference:train[:7000]`` for the bundled questions.

    Raises:
        DataError: there is no such data, a line cannot be read, or no record can be used; it names file and line.
    """
    if source.startswith(REFERENCE):
        return _from_reference(source), 0
    name, _, split = source.rpartition(":")
    place = (source, None) if Path(source).exists() or not name else (name, split)
    samples, faults, files = list[Sample](), list[str](), dict[str, Any]()
    for number, record in enumerate(read_records(*place), 1):
        try:
            samples.append(sample_of(record, str(number), COLUMNS, files, fetch_images=False))
        except Refusal as error:
            faults.append(f"{record.where}: {error}")
    if not samples:
        raise DataError(faults[0] if faults else f"{source}: no records")
    for fault in faults[:SHOWN]:
        log.warning("record skipped (%d in all): %s", len(faults), fault)
    return samples, len(faults)


def records_digest(samples: Iterable[Sample]) -> str:
    """Return a digest of what is trained on: questions, answers, boxes and images, in their order.

    An image file counts by its name and size, so that a large data set is not read twice.
    """
    digest = hashlib.sha256()
    for sample in samples:
        fields = [sample.text, sample.answers, sample.turns, sample.boxes, [_image_key(p) for p in sample.images]]
        digest.update(json.dumps(fields).encode())
    return digest.hexdigest()[:16]


def _image_key(picture: Picture) -> str | None:
    if isinstance(picture, Path) and picture.is_file():
        return f"{picture.name} {picture.stat().st_size}"
    return content_key(picture)


def _from_reference(source: str) -> list[Sample]:
    from tokensieve.reference.benchmark import benchmark
    from tokensieve.reference.questions import TYPES

    match = re.fullmatch(r"(\w+)(?:\[:(\d+)\])?", source.removeprefix(REFERENCE))
    if match is None:
        raise Refusal(f"the bundled questions are reference:train or, for a part, reference:train[:700]; got {source}")
    split, count = match[1], int(match[2] or SCENES * len(TYPES))
    return reference_samples(benchmark(split, scenes=-(-count // len(TYPES)))[:count])


def held_out(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Split off a twentieth of the images, at most about 300 questions, with all their questions.

    Raises:
        Refusal: all questions are about one image.
    """
    groups = _by_image(samples)
    if len(groups) < 2:
        raise Refusal("all records are about one image, so none can be held out; name others with --evaluation")
    random.Random(seed).shuffle(groups)
    count = max(1, round(min(len(groups) / 20, 300 / (len(samples) / len(groups)))))
    return _joined(groups[count:]), _joined(groups[:count])


def in_training_order(samples: Sequence[Sample], epochs: float, seed: int) -> list[Sample]:
    """List the samples of all passes: images in random order, and the questions about an image behind each other.

    A batch then encodes an image once for several of its questions.
    """
    chance, listed = random.Random(seed), list[Sample]()
    count = max(1, round(epochs * len(samples)))
    while len(listed) < count:
        groups = _by_image(samples)
        for group in groups:
            chance.shuffle(group)
        chance.shuffle(groups)
        listed += _joined(groups)
    return listed[:count]


def _by_image(samples: Sequence[Sample]) -> list[list[Sample]]:
    groups: dict[Any, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.images[-1], []).append(sample)  # the image that the question is about
    return list(groups.values())


def _joined(groups: Sequence[Sequence[Sample]]) -> list[Sample]:
    return [sample for group in groups for sample in group]


class Questions(Dataset[Sample]):
    """Samples whose images can be read. One that cannot is replaced by the next, counted and logged."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.bad: set[tuple[str, str]] = set()
        self._read: set[Any] = set()  # images that were read once

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        for step in range(len(self)):
            sample = self.samples[(index + step) % len(self)]
            place = (sample.where, sample.id)
            if place in self.bad:
                continue
            if self._read.issuperset(sample.images):
                return sample
            try:
                sample.open_all()
            except DataError as error:
                self.bad.add(place)
                if len(self.bad) <= SHOWN:
                    log.warning("record skipped (%d so far): %s", len(self.bad), error)
                continue
            self._read.update(sample.images)
            return sample
        raise Refusal("no record has images that can be read")


class Collator:
    """Convert samples to model inputs: the prompts of ``tokensieve compare``, left-padded, and the answers after them.

    The batch holds the processor's tensors; ``image_numbers`` `[I]`, equal for equal images; and ``labels`` `[B, A]`,
    the answers' ids on the last A columns, −100 before them.

    Args:
        processor: the model's.
        prompt: text of the user turn.
    """

    def __init__(self, processor: Any, prompt: str) -> None:
        self.processor, self.prompt = processor, prompt
        self.tokenizer = getattr(processor, "tokenizer", processor)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        check_texts(self.processor, samples, self.prompt)
        images = opened_images(samples)
        texts, turns = user_turns(samples, self.prompt)
        tensors = left_padded_batch(self.processor, images, texts, turns)
        answers = [
            self.answer_ids(*row) for row in zip(images, texts, turns, map(commonest_answer, samples), strict=True)
        ]
        tensors |= _appended(tensors, answers, int(self.tokenizer.pad_token_id or 0))
        return {**tensors, "image_numbers": torch.tensor(image_numbers(samples))}

    def answer_ids(self, images: Sequence[Any], text: str, turns: Sequence[tuple[str, str]], answer: str) -> list[int]:
        """Return the ids that follow a prompt: the answer and the end of the turn, as the chat template writes them."""
        end = self.tokenizer.eos_token or ""
        if not getattr(self.processor, "chat_template", None):
            return self._ids(f" {answer}{end}")
        messages = chat_messages(images, text, turns)
        render = self.processor.apply_chat_template
        prompt = render(messages, add_generation_prompt=True, tokenize=False)
        whole = render([*messages, _assistant(answer)], add_generation_prompt=False, tokenize=False).rstrip()
        if not whole.startswith(prompt):  # such a template writes more after the prompt than an answer has
            whole = f"{prompt}{answer}{end}"
        before, after = self._ids(prompt), self._ids(whole)
        if after[: len(before)] == before:
            return after[len(before) :]
        return self._ids(f"{answer}{end}")  # the tokenizer joins the prompt's last token to the answer

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _assistant(answer: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


def commonest_answer(sample: Sample) -> str:
    """Return the commonest answer of a sample; of equally common ones, the first."""
    return Counter(sample.answers).most_common(1)[0][0]


def opened_images(samples: Sequence[Sample]) -> list[list[Any]]:
    """Open the images of each sample, each image once."""
    opened: dict[Any, Any] = {}
    for sample in samples:
        for number, picture in enumerate(sample.images):
            if picture not in opened:
                opened[picture] = sample.open(number)
    return [[opened[picture] for picture in sample.images] for sample in samples]


def _appended(tensors: Mapping[str, Tensor], answers: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """Return every tensor with a column per token, left-padded again behind its answer, and the labels."""
    ids, mask = tensors["input_ids"], tensors["attention_mask"].bool()
    longest = max(map(len, answers))
    width = max(int(row.sum()) + len(answer) for row, answer in zip(mask, answers, strict=True))
    fillers = {"input_ids": padding, "attention_mask": 0, "mm_token_type_ids": 0, "token_type_ids": 0}
    extended = {name: tensors[name].new_full((len(ids), width), v) for name, v in fillers.items() if name in tensors}
    labels = ids.new_full((len(ids), longest), IGNORED)
    for row, answer in enumerate(answers):
        added = {"input_ids": ids.new_tensor(answer), "attention_mask": ids.new_ones(len(answer))}
        labels[row, longest - len(answer) :] = added["input_ids"]
        for name, out in extended.items():
            before = tensors[name][row][mask[row]]
            values = torch.cat([before, added.get(name, before.new_zeros(len(answer)))])
            out[row, width - len(values) :] = values
    return {**extended, "labels": labels}
