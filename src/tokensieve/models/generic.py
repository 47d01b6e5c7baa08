"""Unregistered models whose image features replace placeholders in the prompt, as in all known families."""

from __future__ import annotations

import inspect
from typing import Any

from tokensieve.models.family import EncodeCall, Family
from tokensieve.models.layout import TokenLayout

QUERIES = "a Q-Former hands its LLM 32 tokens, and generate() bypasses the forward in which tokens would be dropped"
REFUSED = {
    "mllama": "its LLM reads images by cross-attention: no visual token is in its sequence",
    "blip-2": QUERIES,
    "instructblip": QUERIES,
}
"""Model types that discovery would accept but that cannot be supported, with the reason."""


class Generic(Family):
    """Fallback for unregistered model types. It uses only what can be discovered at run time, and is untested.

    Each entry of the encoder's output is taken as one image. Methods that read the encoder or need a grid are refused.
    """

    name = "generic"
    untested = True
    encoder_unreadable = "nothing is known about how its encoder's rows become visual tokens"

    def __init__(self, model: Any) -> None:
        self.title = f"{type(model).__name__} (untested)"  # type: ignore[misc]
        if not hasattr(model.get_decoder(), "layers"):
            self.stages = ("connector",)  # type: ignore[misc]
            decoder = type(model.get_decoder()).__name__
            self.decoder_unsupported = f"the layers of its {decoder} cannot be found"  # type: ignore[misc]

    def layouts(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        return [TokenLayout(len(rows)) for rows in call.output.pooler_output]


def discoverable(model: Any) -> bool:
    """Return whether image features replace placeholders in this model's prompt and forward accepts encoded images."""
    encode = getattr(getattr(model, "base_model", None), "get_image_features", None)
    encoded = "mm_encoder_outputs" in inspect.signature(model.forward).parameters if encode is not None else False
    return encoded and isinstance(getattr(model.config, "image_token_id", None), int)
