"""Unregistered models whose image features replace placeholders in the prompt, as in all known families."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.errors import Refusal
from tokensieve.models.family import EncodeCall, Family
from tokensieve.models.layout import TokenLayout
from tokensieve.models.patch_order import RULES, discover_rules, rows_apart, unit_of_row
from tokensieve.models.planes import rows_of

QUERIES = "a Q-Former hands its LLM 32 tokens, and generate() bypasses the forward in which tokens would be dropped"
CROSS_ATTENTION = "its LLM reads images by cross-attention: no visual token is in its sequence"
NO_PLACEHOLDERS = "no placeholder tokens stand for the image in its prompt"
REFUSED = {
    "mllama": CROSS_ATTENTION,
    "idefics": CROSS_ATTENTION,
    "evolla": "it reads proteins instead of images",
    "blip": CROSS_ATTENTION,
    "blip-2": QUERIES,
    "instructblip": QUERIES,
    "instructblipvideo": QUERIES,
    "git": NO_PLACEHOLDERS,
    "florence2": "its visual tokens enter a text encoder, not a decoder-only LLM",
    "t5gemma2": "its visual tokens enter a text encoder, not a decoder-only LLM",
    "udop": "its patches enter a text encoder, not a decoder-only LLM",
    "pix2struct": "its encoder reads the image alone; the decoder reads it by cross-attention",
    "pp_formulanet": "its encoder reads the image alone; the decoder reads it by cross-attention",
    "vision-encoder-decoder": "its encoder reads the image alone; the decoder reads it by cross-attention",
    "kosmos-2": "its forward takes no encoded images (mm_encoder_outputs)",
    "kosmos-2.5": "its forward takes no encoded images (mm_encoder_outputs)",
    "pi0": "it predicts a robot's actions and generates no text",
    "diffusion_gemma": "it generates text by diffusion: there is no causal prefill to shorten",
    "chameleon": "its images are discrete codes of a vocabulary, embedded like words",
    "emu3": "its images are discrete codes of a vocabulary, embedded like words",
    "mistral4": "it is a text-only LLM: its config has no vision encoder",
}
"""Model types that cannot be supported, with the reason."""


class Generic(Family):
    """Fallback for unregistered model types. It uses only what can be discovered at run time.

    Each entry of the encoder's output is taken as one image. The order in which the rows of the vision encoder become
    visual tokens is discovered on the first image (:mod:`~tokensieve.models.patch_order`).
    """

    name = "generic"
    untested = True

    def __init__(self, model: Any) -> None:
        self.title = f"{type(model).__name__} (untested)"  # type: ignore[misc]
        # {rows of the encoder for each visual token: the orders that the images so far have shown}
        self._rules: dict[int, tuple[str, ...]] = {}
        if model.get_encoder(modality="image") is model:
            self.encoder_unreadable = "it has no vision encoder: its patches enter the LLM"  # type: ignore[misc]
        decoder = model.get_decoder()
        if not hasattr(decoder, "layers"):
            reason = f"the layers of its {type(decoder).__name__} cannot be found"
        elif _per_layer_inputs(decoder):
            reason = "each layer of its LLM receives further embeddings of all tokens"
        elif _adds_features(decoder):
            reason = "its LLM adds visual features before several layers"
        else:
            return
        self.stages = ("connector",)  # type: ignore[misc]
        self.decoder_unsupported = reason  # type: ignore[misc]

    def layouts(self, model: Any, call: EncodeCall) -> list[TokenLayout]:
        layouts = [TokenLayout(len(rows)) for rows in rows_of(call.output)]
        if all(layout.total == 1 for layout in layouts):  # an entry is a patch: those side by side are an image
            self.joins_tiles = True  # type: ignore[misc]
        return layouts

    def attentions(self, tower: Any) -> list[nn.Module]:
        attentions, config = super().attentions(tower), tower.config
        kinds = getattr(config, "layer_types", None) or []
        full = getattr(tower, "fullatt_block_indexes", None)
        if full is None and len(kinds) == len(attentions):
            full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
        return attentions if full is None else [attentions[layer] for layer in full]

    def projector(self, model: Any) -> nn.Module:
        raise Refusal(f"nothing is known about the rows that enter the projector of {self.title}")

    def to_units(self, model: Any, call: EncodeCall, reads: Sequence[Tensor]) -> Tensor:
        rows = torch.cat([read.flatten(0, 1) for read in reads])
        tower: Any = self.tower(model)
        sizes = [layout.total for layout in self.layouts(model, call)]
        packed = len(reads) == 1 and len(sizes) > 1 and call.inputs.get("image_sizes") is not None
        if packed and "flash" in tower.config._attn_implementation:  # its calls have no block-diagonal mask
            raise Refusal("the attention of several images at once cannot be read from a flash kernel; use sdpa")
        each = round(len(rows) / sum(sizes))  # an encoder may merge rows between its layers
        rules = self._rules.get(each, RULES)
        by_rule = [(rule, unit_of_row(rule, tower, call.inputs, len(rows), sizes)) for rule in rules]
        fitting = {rule: unit for rule, unit in by_rule if unit is not None}
        if not fitting and rules is not RULES:
            raise Refusal(f"the visual tokens of these images do not fit the order of the first one, {rules[0]!r}")
        # rules that agree on one image, such as one that fits in a window of attention, may differ on a larger one
        if rules is RULES or bool(rows_apart(list(fitting.values())).any()):
            rules = self._rules[each] = discover_rules(model, tower, call, len(rows), sizes, rules)
        rule, unit = next((rule, fitting[rule]) for rule in rules if rule in fitting)
        if rule.endswith("others") and self.has_cls(tower):
            raise Refusal(
                f"[CLS] is not the first row of {type(tower).__name__}; use a method that reads nothing in it"
            )
        unit = unit.to(rows.device)
        shown, units = unit >= 0, unit[unit >= 0]  # -1: a row that no visual token shows, such as [CLS]
        sums = rows.new_zeros(sum(sizes), *rows.shape[1:]).index_add(0, units, rows[shown])
        counts = torch.bincount(units, minlength=sum(sizes)).view(-1, *[1] * (rows.ndim - 1))
        return sums / counts


def discoverable(model: Any) -> bool:
    """Return whether image features replace placeholders in this model's prompt and forward accepts encoded images."""
    encode = getattr(getattr(model, "base_model", None), "get_image_features", None)
    encoded = "mm_encoder_outputs" in inspect.signature(model.forward).parameters if encode is not None else False
    return encoded and isinstance(getattr(model.config, "image_token_id", None), int)


def _per_layer_inputs(decoder: Any) -> bool:
    """Return whether the layers take embeddings of all tokens beside the hidden states, as in Gemma 3n and Gemma 4."""
    return bool(getattr(decoder.config, "hidden_size_per_layer_input", 0))


def _adds_features(decoder: Any) -> bool:
    """Return whether the LLM adds visual features between its layers in another way than Qwen3-VL."""
    names = inspect.signature(decoder.forward).parameters
    return any("deepstack" in name for name in names) and not hasattr(decoder, "_deepstack_process")
