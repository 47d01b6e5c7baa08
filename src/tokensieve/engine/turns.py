"""A later turn with ``reselect=True``: the method decides anew by the new words, and the vision encoder does not run.

The conversation stays beside the KV cache: its prompt as the caller gave it, with the encoders' outputs in the place of
the pixels, and the ids of later steps. A new turn becomes a prefill of the whole conversation, which refills the same
cache. Rows that were dropped cannot be appended to the cache instead: the text between did not attend to them, so the
answer would not be that of a fresh prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokensieve.errors import Refusal

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
ENCODED = "mm_encoder_outputs"
UNREAD = ("last_hidden_state", "hidden_states", "attentions")  # of an encode call, nothing but features is read


@dataclass(frozen=True, eq=False)
class Conversation:
    """The turns so far, as a new prefill needs them. They travel on the cache, and are freed with it.

    Attributes:
        method: the spec that was attached; its evidence is part of the encoders' outputs.
        prompt: the arguments of the latest prefill, unreduced, with the encoders' outputs.
        steps: ids `[B, n]` of the forwards since then.
    """

    method: str
    prompt: dict[str, Any]
    steps: tuple[Tensor, ...] = ()

    def __deepcopy__(self, memo: Any) -> Conversation:
        """Share the tensors with a copied cache: they are never changed in place."""
        return self

    @property
    def ids(self) -> Tensor:
        """The ids of all columns in the cache, `[B, L]`."""
        return torch.cat([self.prompt["input_ids"], *self.steps], 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the encoders' features that are kept."""
        planes = [
            plane
            for encoded in self.prompt[ENCODED].values()
            for plane in (encoded.pooler_output, *(getattr(encoded, "deepstack_features", None) or ()))
        ]
        return sum(rows.nbytes for plane in planes for rows in plane)

    def step(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Conversation]:
        """Return the arguments of a decode step, numbered after the prompt, and the conversation with its ids.

        ``generate`` numbers a later turn's steps by the model's ``rope_deltas``, which for videos count positions of
        frames that lie behind the words.
        """
        ids, positions = kwargs["input_ids"], self.prompt.get("position_ids")
        if positions is not None:
            before = sum(step.shape[1] for step in self.steps)
            following = torch.arange(1, ids.shape[1] + 1, device=ids.device) + before
            kwargs = {**kwargs, "position_ids": positions[..., -1:] + following}
        return kwargs, replace(self, steps=(*self.steps, ids))

    def check(self, kwargs: dict[str, Any], cache: Cache, method: str) -> None:
        """Refuse a new turn that cannot be decided anew, before anything runs."""
        ids, mask, held = kwargs.get("input_ids"), kwargs.get("attention_mask"), cache.get_seq_length()
        if ids is None or kwargs.get("labels") is not None:
            raise Refusal("reselect=True needs the input_ids of a new turn, and takes no labels")
        if method != self.method:
            raise Refusal(f"this conversation was begun with {self.method}, and {method} is attached: begin a new one")
        if getattr(cache, "offloading", False):
            raise Refusal("reselect=True does not refill an offloaded cache: use a plain DynamicCache")
        if any(getattr(layer, "moved", False) for layer in cache.layers) or len(ids) != len(self.prompt["input_ids"]):
            raise Refusal("the rows of this cache were moved, as in beam search: reselect=True cannot follow them")
        if (recorded := self.ids.shape[1]) != held:
            raise Refusal(
                f"the cache counts {held} columns where the conversation has {recorded}: one that was cropped or "
                "compressed, or continued without reselect=True or by inputs_embeds, cannot be decided anew"
            )
        if mask is not None and tuple(mask.shape) != (len(ids), held + ids.shape[1]):
            raise Refusal(
                f"attention_mask must cover the {held} columns in the cache and the {ids.shape[1]} new ones; "
                f"got {list(mask.shape)}"
            )

    def continued(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a prefill of all turns; its last columns are those of ``kwargs``, the new turn.

        Padding that stands between turns moves to the left of its row.
        """
        new, prompt, arguments = kwargs["input_ids"], self.prompt, {**kwargs, **self.prompt}
        arguments["input_ids"] = ids = torch.cat([self.ids, new], 1)
        first, later = prompt["input_ids"].shape[1], ids.shape[1] - prompt["input_ids"].shape[1]
        mask, prompt_mask = kwargs.get("attention_mask"), prompt.get("attention_mask")
        if mask is not None or prompt_mask is not None:
            # not the caller's mask of the prompt: padding between earlier turns was moved to the left here
            head = torch.ones_like(prompt["input_ids"]) if prompt_mask is None else prompt_mask
            tail = head.new_ones(len(ids), later) if mask is None else mask[:, first:].to(head.dtype)
            arguments["attention_mask"] = mask = torch.cat([head, tail], 1)
        for name in TOKEN_TYPES:
            if prompt.get(name) is not None:
                of_turn, before = kwargs.get(name), prompt[name]
                of_turn = torch.zeros_like(new) if of_turn is None else of_turn[:, -new.shape[1] :]
                text = before.new_zeros(len(ids), later - new.shape[1])  # generated tokens, and turns without a picture
                arguments[name] = torch.cat([before, text, of_turn.to(before.dtype)], 1)
        arguments.pop("position_ids", None)
        if (positions := prompt.get("position_ids")) is not None:
            steps = torch.arange(1, later + 1, device=ids.device) if mask is None else mask[:, first:].long().cumsum(-1)
            positions = positions.expand(*positions.shape[:-2], len(ids), -1)
            arguments["position_ids"] = torch.cat(
                [positions, positions[..., -1:] + steps.expand(*positions.shape[:-1], -1)], -1
            )
        return arguments if mask is None else _packed(arguments, mask)


def _packed(arguments: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    """Move the padding of each row to its left; a row without padding between its columns stays as it is."""
    order = mask.bool().int().argsort(dim=-1, stable=True)
    for name in ("input_ids", "attention_mask", "position_ids", *TOKEN_TYPES):
        if (value := arguments.get(name)) is not None:
            arguments[name] = value.gather(-1, order.expand(value.shape))
    return arguments


def to_keep(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what a new prefill needs of the arguments of this one: the prompt and the encoders' features.

    Args:
        kwargs: the arguments of a forward whose images are encoded.
    """
    kept: dict[str, Any] = {
        name: value
        for name, value in kwargs.items()
        if isinstance(value, Tensor | list | tuple) and name not in ("labels", "inputs_embeds")
    }
    kept[ENCODED] = {kind: _features_of(encoded) for kind, encoded in kwargs[ENCODED].items() if encoded is not None}
    return kept


def _features_of(encoded: Any) -> Any:
    """Return a copy of an encode call's output without the hidden states, which nothing reads."""
    copied = type(encoded)(**{name: value for name, value in encoded.items() if name not in UNREAD})
    vars(copied).update({name: value for name, value in vars(encoded).items() if name.startswith("_tokensieve")})
    return copied


@dataclass
class RunningTurn:
    """A new turn that is being prefilled with all earlier ones.

    Attributes:
        columns: of the new turn.
        cache: the cache that is refilled.
        layers: its layers before, which are put back if the forward fails.
    """

    columns: int
    cache: Cache
    layers: list[Any]

    def finish(self, output: Any) -> None:
        """Leave the new turn's rows in the output of the forward; ``None``: it failed."""
        if output is None:
            self.cache.layers = self.layers
        for name in ("logits", "last_hidden_state"):
            if (rows := getattr(output, name, None)) is not None:
                setattr(output, name, rows[:, -self.columns :])


def new_columns(kwargs: dict[str, Any]) -> int:
    """Return the number of columns of a forward: one in a decode step, several in a new turn."""
    ids = kwargs.get("input_ids")
    return int((kwargs["inputs_embeds"] if ids is None else ids).shape[1])


def check_call(kwargs: dict[str, Any], new_images: bool) -> None:
    """Refuse a forward that a conversation cannot have, before anything runs."""
    cache, logits = kwargs.get("past_key_values"), kwargs.get("logits_to_keep")
    if new_images and cache is not None and cache.get_seq_length():
        raise Refusal("new images on a filled cache: with reselect=True, give the whole conversation without the cache")
    if isinstance(logits, int) and logits > 1:
        raise Refusal(
            "reselect=True takes the candidates of assisted decoding for a new turn: generate without an assistant "
            "(or, in a plain forward, with logits_to_keep=0 or 1)"
        )
