"""Prompts for the tiny models: samples with images and videos, batches of them by name, and the model's inputs."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.support.families import BOS, IMAGE, PAD, QWEN_VIDEO, VIDEO, Image, Sample, family, words

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def sample(name: str, text: tuple[int, ...], shapes: tuple[int | tuple, ...], seed: int) -> Sample:
    """Return ``text[0]`` words, an image, ``text[1]`` words, … words at the end.

    Args:
        shapes: of each image: which of the family's shapes it has, or (frames, height, width) of a video.
    """
    declared, generator = family(name), torch.Generator().manual_seed(seed)
    available = declared.several if declared.several and len(shapes) > 1 else declared.shapes
    images = [
        declared.draw(available[shape % len(available)] if isinstance(shape, int) else shape, generator)
        for shape in shapes
    ]
    ids = [BOS, *words(text[0], generator)]
    for image, count in zip(images, text[1:], strict=True):
        ids += [*image.ids, *words(count, generator)]
    return Sample(ids, images)


def video(name: str, frames: int, height: int, width: int, seed: int = 0) -> Image:
    return family(name).draw((frames, height, width), torch.Generator().manual_seed(seed))


@cache
def batch(name: str, kind: str) -> list[Sample]:
    """Return a batch by name.

    Images of "ragged" and "mixed" differ in size where the family's may; videos of a batch differ in frames and size in
    Qwen only.
    """
    clip, other = (4, 2, 3), (2, 3, 2) if name in QWEN_VIDEO else (4, 2, 3)
    prompts: dict[str, list[tuple]] = {
        "single": [((3, 6), (0,), 1)],
        "ragged": [((3, 5), (0,), 1), ((6, 12), (1,), 2), ((2, 2), (2,), 3)],
        "two-images": [((3, 2, 5), (0, 2), 4)],
        "mixed": [((3, 1, 5), (0, 1), 4), ((4, 9), (2,), 5), ((30,), (), 6), ((2, 0, 3, 4), (2, 0, 1), 7)],
        "one-and-two": [((3, 5), (0,), 1), ((4, 2, 7), (1, 2), 2), ((9, 3), (2,), 3)],
        "video": [((3, 6), (clip,), 1)],
        "ragged-videos": [((3, 5), (clip,), 1), ((6, 12), (other,), 2)],
        "mixed-videos": [
            ((3, 2, 5), (0, clip), 3),
            ((4, 3, 0, 2), (other, clip, 0), 4),
            ((30,), (), 5),
            ((2, 9), (0,), 6),
        ],
    }
    return [sample(name, *prompt) for prompt in prompts[kind]]


def concatenated(tensors: list[Tensor]) -> Tensor:
    """Concatenate along the first axis, the others padded with zeros."""
    sizes = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        room = [size - length for size, length in zip(sizes, tensor.shape[1:], strict=True)]
        padded.append(pad(tensor, [n for extra in reversed(room) for n in (0, extra)]))
    return torch.cat(padded)


def pixels(name: str, samples: list[Sample]) -> dict[str, Tensor]:
    """Return all inputs of the vision encoder, batched as the processor does it."""
    declared = family(name)
    rows = [[image.inputs for image in s.images] for s in samples]
    out = {}
    for key in dict.fromkeys(key for row in rows for inputs in row for key in inputs):
        tensors = [[inputs[key] for inputs in row if key in inputs] for row in rows]
        per_sample = [concatenated(of_row) for of_row in tensors if of_row]
        out[key] = concatenated([x[None] for x in per_sample] if declared.stacked else per_sample)
    if declared.counts:
        out[declared.counts] = torch.tensor([len(row) for row in rows])
    return out


def collate(name: str, samples: list[Sample], **more: Any) -> dict[str, Tensor]:
    """Return the model's inputs, left-padded as a processor does it."""
    declared, width = family(name), max(len(s.ids) for s in samples)
    ids = torch.tensor([[PAD] * (width - len(s.ids)) + s.ids for s in samples])
    mask = torch.tensor([[0] * (width - len(s.ids)) + [1] * len(s.ids) for s in samples])
    inputs = {"input_ids": ids, "attention_mask": mask, **pixels(name, samples)}
    if declared.types:  # PaliGemma's marks the answer: nothing of a prompt
        kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        inputs[declared.types] = kinds * (declared.bidirectional != "prompt")
    return {**inputs, **more}


@torch.no_grad()
def second_question(model: Any, name: str, samples: list[Sample]) -> tuple[list[list[int]], Tensor]:
    """Generate two tokens, ask three more words on the cache, and generate two more.

    Returns:
        The six tokens behind each prompt whose logits are known, and the logits `[B, 2, V]` of the last two answers.
    """
    inputs, later = collate(name, samples), torch.tensor([[7, 9, 11]] * len(samples))
    first = model.generate(**inputs, max_new_tokens=2, **GREEDY)
    ids = torch.cat([first.sequences, later], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), 5, dtype=torch.long)], 1)
    types = {name: torch.cat([x, x.new_zeros(len(ids), 5)], 1) for name, x in inputs.items() if "type" in name}
    cached = {"attention_mask": mask, "past_key_values": first.past_key_values}
    second = model.generate(input_ids=ids, **types, **cached, max_new_tokens=2, **GREEDY)
    return second.sequences[:, -7:-1].tolist(), torch.stack(second.logits, 1)
