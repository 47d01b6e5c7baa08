"""Questions about one image need the vision tower once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokensieve.engine.encoder.hooks import RECORD, EncoderOutputs


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
