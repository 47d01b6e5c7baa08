"""Questions to model inputs, each image of a batch encoded once, and generated ids back to text."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokensieve.engine.handoff import EncoderOutputs
from tokensieve.errors import Refusal
from tokensieve.evaluate.data import Sample, check_text

CLASSIFIER_INPUTS = ("input_ids", "attention_mask", "pixel_values", "pixel_mask")


def encode(processor: Any, samples: Sequence[Sample], *, prompt: str = "{question}") -> dict[str, Tensor]:
    """Return one left-padded batch of prompts, made with the processor's chat template if it has one.

    A sample with earlier turns gives the whole conversation up to its question.

    Args:
        processor: the model's processor; its own padding side is not changed.
        samples: one question each, about one image or several; the images stand before the first text.
        prompt: text of a user turn; ``{question}`` is replaced.

    Raises:
        DataError: an image that cannot be decoded.
        Refusal: a question that holds a placeholder, or a processor that :func:`left_padded_batch` refuses.
    """
    check_texts(processor, samples, prompt)
    return left_padded_batch(processor, _open_images(samples), *user_turns(samples, prompt))


def user_turns(samples: Sequence[Sample], prompt: str) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Return the text of the last user turn of each sample, and the earlier turns, (text, answer), of each."""
    texts = [prompt.replace("{question}", sample.text) for sample in samples]
    turns = [[(prompt.replace("{question}", text), answer) for text, answer in sample.turns] for sample in samples]
    return texts, turns


def left_padded_batch(
    processor: Any,
    images: Sequence[Sequence[Image.Image]],
    texts: Sequence[str],
    turns: Sequence[Sequence[tuple[str, str]]] | None = None,
) -> dict[str, Tensor]:
    """Return one left-padded batch of prompts, each a user turn with its images before its text.

    Args:
        processor: the model's processor.
        images: of each prompt.
        texts: the last user turn of each prompt.
        turns: (question, answer) of the earlier turns of each prompt; the images then belong to the first.

    Raises:
        Refusal: a processor with neither a chat template nor an image token, or without a template for earlier turns.
    """
    turns = turns or [[] for _ in texts]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    if getattr(processor, "chat_template", None):
        messages = [chat_messages(*row) for row in zip(images, texts, turns, strict=True)]
        template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        return dict(processor.apply_chat_template(messages, **template, processor_kwargs=options))
    if any(turns):
        raise Refusal(f"{type(processor).__name__} has no chat template, and earlier turns need one")
    if getattr(processor, "image_token", None):
        texts = [f"{processor.image_token * len(p)}\n{text}" for p, text in zip(images, texts, strict=True)]
        return dict(processor(images=images, text=texts, **options))
    raise Refusal(f"{type(processor).__name__} has neither a chat template nor an image token")


def chat_messages(
    images: Sequence[Image.Image], text: str, turns: Sequence[tuple[str, str]]
) -> list[dict[str, str | list[dict[str, Any]]]]:
    """Return a conversation in the form of chat templates; the images stand before its first text."""
    questions, answers = [*(question for question, _ in turns), text], [answer for _, answer in turns]
    messages: list[dict[str, str | list[dict[str, Any]]]] = []
    for number, question in enumerate(questions):
        pictures = [{"type": "image", "image": image} for image in images] if number == 0 else []
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        if number < len(answers):
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[number]}]})
    return messages


def first_turn(sample: Sample) -> Sample:
    """Return the first question of a conversation as a sample, without choices and earlier turns."""
    return replace(sample, question=sample.turns[0][0], choices=(), turns=()) if sample.turns else sample


def encode_pairs(
    processor: Any, samples: Sequence[Sample], *, prompt: str = "{question}", longest: int
) -> dict[str, Tensor]:
    """Return a batch for an encoder that classifies answers: texts right-padded, cut to ``longest`` tokens.

    Such an encoder has a fixed list of answers, so choices are not listed in the text.

    Raises:
        DataError: an image that cannot be decoded.
        Refusal: a question about several images, or with earlier turns.
    """
    check_one_image(samples)
    check_texts(processor, samples, prompt)
    images = [image for images in _open_images(samples) for image in images]
    texts = [prompt.replace("{question}", sample.question) for sample in samples]
    options = {"padding": True, "padding_side": "right", "truncation": True, "max_length": longest}
    text_inputs = processor.tokenizer(texts, **options, return_tensors="pt")
    inputs = {**text_inputs, **processor.image_processor(images, return_tensors="pt")}
    return {name: inputs[name] for name in CLASSIFIER_INPUTS if name in inputs}


def decode(processor: Any, generated: Tensor, prompt_length: int) -> list[str]:
    """Return the generated text after the prompt: `[B, L]` ids to B strings, without special tokens."""
    texts = processor.batch_decode(generated[:, prompt_length:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def check_texts(processor: Any, samples: Sequence[Sample], prompt: str = "{question}") -> None:
    """Refuse texts that no tokenizer accepts, or with a placeholder, which would stand for another image or video.

    The error names file and line.
    """
    check_text(prompt, "the prompt")
    texts = [("the prompt: ", prompt), *((sample.error_prefix, sample.text) for sample in samples)]
    texts += [(sample.error_prefix, text) for sample in samples for turn in sample.turns for text in turn]
    for sample in samples:
        check_text(sample.text, f"{sample.error_prefix}the question")
        # these are written to the results in the end
        for text in (sample.id, sample.type, *sample.answers):
            check_text(text, f"{sample.error_prefix}an id, type or answer")
    for kind in ("image", "video"):
        placeholder = getattr(processor, f"{kind}_token", None)
        for prefix, text in texts:
            if placeholder and placeholder in text:
                raise Refusal(f"{prefix}leave {placeholder} out, the {kind} is put there by itself; got {text!r}")


def check_one_image(samples: Sequence[Sample]) -> None:
    """Refuse questions about several images, or with earlier turns."""
    for sample in samples:
        if sample.turns:
            raise Refusal(
                f"{sample.error_prefix}this model answers single questions; got {len(sample.turns)} earlier turns"
            )
        if len(sample.images) > 1:
            raise Refusal(
                f"{sample.error_prefix}this model answers questions about one image; got {len(sample.images)}"
            )


def _open_images(samples: Sequence[Sample]) -> list[list[Image.Image]]:
    """Open the images of each sample; samples about the same image share one."""
    opened: dict[Any, Image.Image] = {}
    for sample in samples:
        for number, picture in enumerate(sample.images):
            if picture not in opened:
                opened[picture] = sample.open(number)
    return [[opened[picture] for picture in sample.images] for sample in samples]


def image_numbers(samples: Sequence[Sample]) -> list[int]:
    """Return a number for each image of each sample, in the order of the prompts; equal images have equal numbers."""
    pictures = [picture for sample in samples for picture in sample.images]
    numbers = {picture: number for number, picture in enumerate(dict.fromkeys(pictures))}
    return [numbers[picture] for picture in pictures]


# -- questions about one image run the vision encoder once ----------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """One batch of prompts, with each distinct image stored once.

    Attributes:
        tensors: the processor's tensors; if ``images`` is set, ``pixel_values`` holds each image once.
        images: for each image of the prompts, in order, its index; ``None`` where ``tensors`` are as the processor made
            them.
        later: `[B, L]`, ids of what follows the first turn's question up to the last question's answer; ``None``
            without earlier turns. ``tensors`` are the first turn then.
    """

    tensors: dict[str, Tensor]
    images: tuple[int, ...] | None
    later: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def without_repetitions(model: Any, tensors: dict[str, Tensor], images: Sequence[int]) -> Inputs:
    """Store each image of a batch once, if the model takes images as plain rows of ``pixel_values``.

    Args:
        model: the top-level model.
        tensors: the processor's tensors.
        images: for each image of the prompts, in order, its number, counted from 0 in order of first appearance (see
            :func:`image_numbers`).
    """
    arguments = set(inspect.signature(model.base_model.get_image_features).parameters) & set(tensors)
    pixels = tensors.get("pixel_values")
    # sizes or tiles beside the pixels would have to be selected, too: such a batch stays as it is
    plain = arguments == {"pixel_values"} and pixels is not None and pixels.ndim == 4 and len(pixels) == len(images)
    if not plain or len(set(images)) == len(images):
        return Inputs(tensors, None)
    first_places = [list(images).index(image) for image in range(max(images) + 1)]
    return Inputs({**tensors, "pixel_values": tensors["pixel_values"][first_places]}, tuple(images))


def generate_arguments(model: Any, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments for ``generate``: each image is encoded once, its features and evidence are repeated.

    Call it while the method is attached: the encoder outputs that are recorded here are those the method needs.
    """
    arguments: dict[str, Any] = dict(inputs.tensors)
    if inputs.images is None:
        return arguments
    output = model.base_model.get_image_features(pixel_values=arguments.pop("pixel_values"), return_dict=True)
    outputs = EncoderOutputs.of(output)
    pooled = output.pooler_output
    index = list(inputs.images)
    # a copy: the model's own output keeps one row per image
    repeated = type(output)(**dict(output.items()))
    repeated.pooler_output = pooled[index] if isinstance(pooled, Tensor) else [pooled[i] for i in index]
    outputs.select(index).attach_to(repeated)
    return {**arguments, "mm_encoder_outputs": {"image": repeated}}


# -- later turns -----------------------------------------------------------------------------------------------------


def added_by_turns(first: dict[str, Tensor], whole: dict[str, Tensor]) -> list[int]:
    """Return the number of tokens that each conversation adds to its first turn's prompt.

    Args:
        first, whole: the left-padded batches of the first turns, and of the whole conversations.
    """
    lengths = [tensors["attention_mask"].sum(-1) for tensors in (whole, first)]
    added: list[int] = (lengths[0] - lengths[1]).tolist()
    return added


def later_tokens(first: dict[str, Tensor], whole: dict[str, Tensor]) -> Tensor:
    """Return the ids that conversations add to their first turns, `[B, L]`; all add equally many.

    Raises:
        Refusal: a conversation does not begin with its first turn's prompt, so that no cache could be continued.
    """
    width, ids = first["input_ids"].shape[1], whole["input_ids"]
    if not torch.equal(ids[:, :width], first["input_ids"]):
        raise Refusal("this chat template writes a first turn otherwise once it is answered: ask without earlier turns")
    return ids[:, width:]


def continued(inputs: Inputs, cache: Any) -> dict[str, Any]:
    """Return the arguments for ``generate`` that continue the cache of the first turn with the later ones."""
    assert inputs.later is not None
    arguments: dict[str, Any] = {"past_key_values": cache}
    for name, value in (("input_ids", None), ("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in inputs.tensors:
            before = inputs.tensors[name]
            added = inputs.later if value is None else torch.full_like(inputs.later, value, dtype=before.dtype)
            arguments[name] = torch.cat([before, added], 1)
    return arguments
