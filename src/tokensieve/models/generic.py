"""Models of no known family, but of the shape that all of them share: features that replace placeholders."""

from __future__ import annotations

import inspect
from typing import Any

from tokensieve.models.family import EncodeCall, Family
from tokensieve.models.layout import TokenLayout

QUERIES = "a Q-Former hands its LLM 32 tokens, and generate() passes by the forward that tokens would leave in"
REFUSED = {
    "mllama": "its LLM reads images by cross-attention: no visual token is in its sequence",
    "blip-2": QUERIES,
    "instructblip": QUERIES,
}
"""Model types that look like the others and cannot be supported, and why."""


class Generic(Family):
    """What can be discovered of any model; it is in no list, and nobody has tested it on yours.

    Entries of the encoder's output are taken for images. Methods that read nothing in the encoder work, those that need
    a grid do not.
    """

    name = "generic"
    untested = True
    opaque = "nothing is known about how its encoder's rows become visual tokens"

    def __init__(self, model: Any) -> None:
        self.title = f"{type(model).__name__} (untested)"  # type: ignore[misc]
        if not hasattr(model.get_decoder(), "layers"):
            self.stages = ("connector",)  # type: ignore[misc]
            self.excluded = f"where the blocks of its {type(model.get_decoder()).__name__} are is unknown"  # type: ignore[misc]

    def shapes(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        return [TokenLayout(len(rows)) for rows in call.output.pooler_output]


def discoverable(model: Any) -> bool:
    """Whether features of images replace placeholders in this model's prompt, and its forward takes them encoded."""
    encode = getattr(getattr(model, "base_model", None), "get_image_features", None)
    takes = "mm_encoder_outputs" in inspect.signature(model.forward).parameters if encode is not None else False
    return takes and isinstance(getattr(model.config, "image_token_id", None), int)
