"""The oracle for any live model: nothing is attached, and the attention mask hides the dropped tokens.

A column that no row attends to has the effect of an absent one, so a reduced run must give the logits of this run.
Positions, image features and cache are the unmodified model's. No code that shortens a sequence takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from tokensieve.models.planes import replace_rows, rows_of
from tokensieve.reduction import Reduction


def dropped_columns(ids: Tensor, token: int, decisions: Sequence[Sequence[Reduction]]) -> Tensor:
    """Mark the columns of the prompts ``ids`` `[B, L]` that hold dropped visual tokens, bool `[B, L]`."""
    dropped = torch.zeros_like(ids, dtype=torch.bool)
    for row, images in enumerate(decisions):
        columns = (ids[row] == token).nonzero().flatten()
        per_image = torch.split(columns, [image.total for image in images])
        for image, image_columns in zip(images, per_image, strict=True):
            dropped[row, image_columns] = True
            dropped[row, image_columns[image.kept]] = False
    return dropped


@contextmanager
def hidden(model: Any, columns: Tensor, first_layer: int = 0, later_everywhere: bool = False) -> Iterator[None]:
    """Hide ``columns`` `[B, L]` (bool) of the prompt from the LLM's layers from ``first_layer`` on, in this context.

    Args:
        later_everywhere: in calls after the prompt's own, hide them from all layers.
    """
    if first_layer == 0:
        handles = [model.register_forward_pre_hook(_hide_everywhere(columns), with_kwargs=True)]
    else:
        handles = [
            layer.register_forward_pre_hook(_hide_in_layer(columns, later_only=number < first_layer), with_kwargs=True)
            for number, layer in enumerate(model.get_decoder().layers)
            if later_everywhere or number >= first_layer
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hide_everywhere(columns: Tensor) -> Callable[..., Any]:
    def hook(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        ids, cache, mask = kwargs["input_ids"], kwargs.get("past_key_values"), kwargs.get("attention_mask")
        length = ids.shape[1] + (0 if cache is None else cache.get_seq_length())
        # a copy: the caller's mask is used again in the next step
        mask = torch.ones(len(ids), length, dtype=torch.long, device=ids.device) if mask is None else mask.clone()
        mask[:, : columns.shape[1]].masked_fill_(columns, 0)
        return args, {**kwargs, "attention_mask": mask}

    return hook


def _hide_in_layer(columns: Tensor, later_only: bool) -> Callable[..., Any]:
    def hook(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        rows, mask = args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")
        length, cache, number = rows.shape[1], kwargs["past_key_values"], layer.self_attn.layer_idx
        if later_only and not cache.get_seq_length(number):
            return None
        if mask is None:  # the kernel would use its own causal mask: write it out, to have a mask to edit
            before = cache.get_seq_length(number)
            mask = torch.ones(length, before + length, dtype=torch.bool, device=rows.device).tril(before)[None, None]
        hidden_columns = columns
        if mask.ndim == 4:  # [B, heads, queries, keys], whose keys start at the first column of a sliding window
            hidden_columns = columns[:, None, None, cache.get_mask_sizes(length, number)[1] :]
        # a mask shared by the batch needs one copy per row, as each row hides other columns
        mask = mask.expand(len(columns), *mask.shape[1:]).clone()
        least = 0 if mask.dtype == torch.bool or mask.ndim == 2 else torch.finfo(mask.dtype).min
        mask[..., : hidden_columns.shape[-1]].masked_fill_(hidden_columns, least)
        return args, {**kwargs, "attention_mask": mask}

    return hook


def stand_ins(
    ids: Tensor, token: int, decisions: Sequence[Sequence[Reduction]], sizes: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Return for each column of the prompts ``ids`` `[B, L]` the column whose token it shows, `[B, L]`.

    A kept token of size s is shown by itself and by s − 1 columns of dropped tokens; all other columns show themselves.
    """
    shown = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
    for row, images in enumerate(decisions):
        columns = (ids[row] == token).nonzero().flatten()
        per_image = torch.split(columns, [image.total for image in images])
        for image, image_columns, image_sizes in zip(images, per_image, sizes[row], strict=True):
            copies = image_columns[image.kept].repeat_interleave(image_sizes.round().long() - 1)
            dropped = torch.ones_like(image_columns, dtype=torch.bool).index_fill(0, image.kept, False)
            shown[row, image_columns[dropped][: len(copies)]] = copies
    return shown


@contextmanager
def copied(model: Any, shown: Tensor, first_layer: int = 0) -> Iterator[None]:
    """Let columns of the prompt show the tokens of ``shown`` `[B, L]` in the LLM's layers from ``first_layer`` on.

    A copy has row, position and visibility of its token, and attends as that token does.
    """
    layers = model.get_decoder().layers[first_layer:]
    handles = [layer.register_forward_pre_hook(_copy_in_layer(shown), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copy_in_layer(shown: Tensor) -> Callable[..., Any]:
    def hook(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        rows, mask = args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")
        cache, (batch, length) = kwargs["past_key_values"], shown.shape
        if rows.shape[1] != length or cache.get_seq_length(layer.self_attn.layer_idx):
            return None  # a later step: the cache holds the copies
        each = torch.arange(batch, device=rows.device)[:, None]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool, device=rows.device).tril()[None, None]
        mask = mask.expand(batch, -1, -1, -1)[each[..., None], 0, shown[:, :, None], shown[:, None]][:, None]
        rope = tuple(part.expand(batch, -1, -1)[each, shown] for part in kwargs["position_embeddings"])
        kwargs = {**kwargs, "attention_mask": mask, "position_embeddings": rope}
        kwargs.pop("hidden_states", None)
        return (rows[each, shown], *args[1:]), kwargs

    return hook


@contextmanager
def merged(model: Any, decisions: Sequence[Sequence[Reduction]]) -> Iterator[None]:
    """Replace the row at each anchor of an image by its decision's mixture of rows, or by the row that a net made."""
    flat = [image for images in decisions for image in images]
    if all(image.mixing is None and image.rows is None for image in flat):
        yield
        return
    base = model.base_model
    encode = base.get_image_features
    instance_attribute = vars(base).get("get_image_features")  # present if another tool has wrapped it already

    @wraps(encode)
    def mixing(*args: Any, **kwargs: Any) -> Any:
        out = encode(*args, **kwargs)
        replace_rows(out, _mixed(rows_of(out), flat), lambda level: _mixed(level, flat))
        return out

    base.get_image_features = mixing
    try:
        yield
    finally:
        del base.get_image_features
        if instance_attribute is not None:
            base.get_image_features = instance_attribute


def _mixed(pooled: Any, decisions: Sequence[Reduction]) -> Any:
    """Mix the rows of all images; return them in the model's form: one tensor, or one per image or per sample."""
    parts = [pooled] if isinstance(pooled, Tensor) else list(pooled)
    rows = torch.cat([part.flatten(0, -2) for part in parts])
    images = [image.clone() for image in torch.split(rows, [decision.total for decision in decisions])]
    for image, decision in zip(images, decisions, strict=True):
        image[decision.anchors] = decision.apply(image) if decision.rows is None else decision.rows.to(image.dtype)
    sizes = [part.flatten(0, -2).shape[0] for part in parts]
    mixed = torch.split(torch.cat(images), sizes)
    shaped = [rows.view_as(part) for rows, part in zip(mixed, parts, strict=True)]
    return shaped[0] if isinstance(pooled, Tensor) else type(pooled)(shaped)
