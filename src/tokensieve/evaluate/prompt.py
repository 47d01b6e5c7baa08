"""Questions to model inputs, and generated ids back to text."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from tokensieve.engine.encoder.hooks import RECORD, EncoderOutputs
from tokensieve.errors import Refusal
from tokensieve.evaluate.data import Sample

ENCODER_INPUTS = ("input_ids", "attention_mask", "pixel_values", "pixel_mask")
KEYWORDS = {"padding": True, "padding_side": "left", "return_tensors": "pt"}


def encode(processor: Any, samples: Sequence[Sample], *, prompt: str = "{question}") -> dict[str, Tensor]:
    """One left-padded batch of prompts, through the processor's chat template where it has one.

    Args:
        processor: the model's processor; its own padding side is not changed.
        samples: one image and one question each.
        prompt: what the user says; ``{question}`` is replaced.

    Raises:
        DataError: an image that cannot be decoded.
        ValueError: a processor with neither a chat template nor an image token; a question that holds a placeholder.
    """
    opened: dict[Any, Image.Image] = {}
    for sample in samples:
        if sample.image not in opened:
            opened[sample.image] = sample.open()
    images = [opened[sample.image] for sample in samples]
    check_texts(processor, samples, prompt)
    texts = [prompt.replace("{question}", sample.question) for sample in samples]
    if getattr(processor, "chat_template", None):
        turns = [[_turn(image, text)] for image, text in zip(images, texts, strict=True)]
        inputs = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=dict(KEYWORDS)
        )
    elif getattr(processor, "image_token", None):
        texts = [f"{processor.image_token}\n{text}" for text in texts]
        inputs = processor(images=[[image] for image in images], text=texts, **KEYWORDS)
    else:
        raise Refusal(f"{type(processor).__name__} has neither a chat template nor an image token")
    return dict(inputs)


def encode_pairs(
    processor: Any, samples: Sequence[Sample], *, prompt: str = "{question}", longest: int
) -> dict[str, Tensor]:
    """A batch for an encoder that classifies answers: questions padded on the right, cut to ``longest`` tokens.

    Raises:
        DataError: an image that cannot be decoded.
    """
    opened = {image: sample.open() for image, sample in {sample.image: sample for sample in samples}.items()}
    images = [opened[sample.image] for sample in samples]
    texts = [prompt.replace("{question}", sample.question) for sample in samples]
    options = {"padding": True, "padding_side": "right", "truncation": True, "max_length": longest}
    words = processor.tokenizer(texts, **options, return_tensors="pt")
    made = {**words, **processor.image_processor(images, return_tensors="pt")}
    return {name: made[name] for name in ENCODER_INPUTS if name in made}


def decode(processor: Any, generated: Tensor, prompt_length: int) -> list[str]:
    """Text of what was generated after the prompt: `[B, L]` ids to B strings, special tokens left out."""
    texts = processor.batch_decode(generated[:, prompt_length:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def check_texts(processor: Any, samples: Sequence[Sample], prompt: str = "{question}") -> None:
    """Refuse, naming file and line, words that the processor would take for another image (or video)."""
    for kind in ("image", "video"):
        mark = getattr(processor, f"{kind}_token", None)
        said = [("the prompt", prompt), *((sample.where, sample.question) for sample in samples)]
        for where, text in said:
            if mark and mark in text:
                place = where and f"{where}: "
                raise Refusal(f"{place}leave {mark} out, the {kind} is put there by itself; got {text!r}")


def _turn(image: Image.Image, text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}


@dataclass(frozen=True)
class Inputs:
    """One batch of prompts, each image of it held once.

    Attributes:
        tensors: what the processor made; ``pixel_values`` without repetitions if ``images`` is set.
        images: for each prompt the index of its image; ``None`` where prompts and images were left as they were.
    """

    tensors: dict[str, Tensor]
    images: tuple[int, ...] | None

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def without_repetitions(model: Any, tensors: dict[str, Tensor], images: Sequence[int]) -> Inputs:
    """Keep each image of a batch once, where the model takes images as plain rows of ``pixel_values``.

    Args:
        model: the top-level model.
        tensors: what the processor made, one image per prompt.
        images: for each prompt the number of its image, counted from 0 in order of first appearance.
    """
    arguments = set(inspect.signature(model.base_model.get_image_features).parameters) & set(tensors)
    pixels = tensors.get("pixel_values")
    plain = arguments == {"pixel_values"} and pixels is not None and pixels.ndim == 4 and len(pixels) == len(images)
    if not plain or len(set(images)) == len(images):
        return Inputs(tensors, None)
    first = [list(images).index(image) for image in range(max(images) + 1)]
    return Inputs({**tensors, "pixel_values": tensors["pixel_values"][first]}, tuple(images))


def encoded(model: Any, inputs: Inputs) -> dict[str, Any]:
    """Arguments for ``generate``: each image is encoded once, its features and evidence are repeated.

    Call it with the method attached: the tower's record must be the method's.
    """
    arguments: dict[str, Any] = dict(inputs.tensors)
    if inputs.images is None:
        return arguments
    output = model.base_model.get_image_features(pixel_values=arguments.pop("pixel_values"), return_dict=True)
    record: EncoderOutputs = getattr(output, RECORD)
    pooled = output.pooler_output
    index = list(inputs.images)
    repeated = type(output)(**dict(output.items()))
    repeated.pooler_output = pooled[index] if isinstance(pooled, Tensor) else [pooled[i] for i in index]
    setattr(repeated, RECORD, record.of(index))
    return {**arguments, "mm_encoder_outputs": {"image": repeated}}
