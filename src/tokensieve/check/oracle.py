"""The oracle for any live model: nothing is attached, and what a method dropped is hidden by the attention mask.

A column that nobody may attend to is as good as absent, so a reduced run must give the logits of this one. Positions,
image features and cache are the unmodified model's; no code that shortens a sequence takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from tokensieve.reduction import Reduction


def dropped_columns(ids: Tensor, token: int, decisions: Sequence[Sequence[Reduction]]) -> Tensor:
    """Which columns of the prompts ``ids`` `[B, L]` hold visual tokens that the decisions dropped, bool."""
    gone = torch.zeros_like(ids, dtype=torch.bool)
    for row, images in enumerate(decisions):
        columns = (ids[row] == token).nonzero().flatten()
        for image, own in zip(images, torch.split(columns, [image.total for image in images]), strict=True):
            gone[row, own] = True
            gone[row, own[image.kept]] = False
    return gone


@contextmanager
def hidden(model: Any, columns: Tensor, block: int = 0) -> Iterator[None]:
    """Within this context no block of the LLM from ``block`` on attends to ``columns`` `[B, L]` bool of the prompt."""
    if block == 0:
        handles = [model.register_forward_pre_hook(_everywhere(columns), with_kwargs=True)]
    else:
        layers = model.get_decoder().layers[block:]
        handles = [layer.register_forward_pre_hook(_in_block(columns), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _everywhere(columns: Tensor) -> Callable[..., Any]:
    def hook(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        new, cache = kwargs["input_ids"], kwargs.get("past_key_values")
        length = new.shape[1] + (0 if cache is None else cache.get_seq_length())
        given = kwargs.get("attention_mask")
        mask = torch.ones(len(new), length, dtype=torch.long, device=new.device) if given is None else given.clone()
        mask[:, : columns.shape[1]].masked_fill_(columns, 0)
        return args, {**kwargs, "attention_mask": mask}

    return hook


def _in_block(columns: Tensor) -> Callable[..., Any]:
    def hook(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        rows, mask = args[0] if args else kwargs["hidden_states"], kwargs.get("attention_mask")
        length, cache, number = rows.shape[1], kwargs["past_key_values"], layer.self_attn.layer_idx
        if mask is None:  # the kernel's own causal mask
            before = cache.get_seq_length(number)
            mask = torch.ones(length, before + length, dtype=torch.bool, device=rows.device).tril(before)[None, None]
        gone = columns
        if mask.ndim == 4:  # of the columns that the cache holds: a window's are the last
            gone = columns[:, None, None, cache.get_mask_sizes(length, number)[1] :]
        mask = mask.expand(len(columns), *mask.shape[1:]).clone()
        least = 0 if mask.dtype == torch.bool or mask.ndim == 2 else torch.finfo(mask.dtype).min
        mask[..., : gone.shape[-1]].masked_fill_(gone, least)
        return args, {**kwargs, "attention_mask": mask}

    return hook


@contextmanager
def merged(model: Any, decisions: Sequence[Sequence[Reduction]]) -> Iterator[None]:
    """Within this context the rows at the anchors of each image are what its decision mixes there."""
    flat = [image for images in decisions for image in images]
    if all(image.mixing is None for image in flat):
        yield
        return
    base = model.base_model
    encode, own = base.get_image_features, vars(base).get("get_image_features")  # somebody may have wrapped it, too

    @wraps(encode)
    def mixing(*args: Any, **kwargs: Any) -> Any:
        out = encode(*args, **kwargs)
        out.pooler_output = _mixed(out.pooler_output, flat)
        if getattr(out, "deepstack_features", None) is not None:
            out.deepstack_features = [_mixed(level, flat) for level in out.deepstack_features]
        return out

    base.get_image_features = mixing
    try:
        yield
    finally:
        del base.get_image_features
        if own is not None:
            base.get_image_features = own


def _mixed(pooled: Any, decisions: Sequence[Reduction]) -> Any:
    """Features in the form the model made them: one tensor, or one per image or per sample."""
    parts = [pooled] if isinstance(pooled, Tensor) else list(pooled)
    rows = torch.cat([part.flatten(0, -2) for part in parts])
    images = [image.clone() for image in torch.split(rows, [decision.total for decision in decisions])]
    for image, decision in zip(images, decisions, strict=True):
        image[decision.anchors] = decision.apply(image)
    sizes = [part.flatten(0, -2).shape[0] for part in parts]
    shaped = [own.view_as(part) for own, part in zip(torch.split(torch.cat(images), sizes), parts, strict=True)]
    return shaped[0] if isinstance(pooled, Tensor) else type(pooled)(shaped)
