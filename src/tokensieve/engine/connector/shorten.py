"""Shorten a prefill: the features of each image, and by the same columns every argument with a column per token."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokensieve.engine.cache import PrefixInfo
from tokensieve.engine.connector.images import PromptImages
from tokensieve.engine.handoff import ImageReduction
from tokensieve.engine.prompt.placeholders import ColumnSelection, on_device
from tokensieve.errors import Refusal
from tokensieve.models import Family
from tokensieve.models.planes import replace_rows, rows_of

PADDING_OF = {"mm_token_type_ids": 0, "token_type_ids": 0, "labels": -100}
"""Further arguments with a column per token, and the value on padding."""


def reduce_features(
    family: Family,
    model: Any,
    encoded: Any,
    prompt: PromptImages,
    images: Sequence[ImageReduction],
    numbers: Sequence[int],
) -> Any:
    """Return a copy of an encode call's output with every feature plane reduced. The original may be used again.

    Args:
        images: the decisions about all images of the prompt.
        numbers: the numbers of the images that this call encoded.
    """
    features, images = [prompt.features[n] for n in numbers], [images[n] for n in numbers]
    output, reductions = type(encoded)(**dict(encoded.items())), [image.features for image in images]

    def reduce_plane(plane: Any) -> list[Tensor]:
        return [reduction.apply(rows) for rows, reduction in zip(plane, reductions, strict=True)]

    if encoded.pooler_output is None and any(image.registers is not None for image in images):
        raise Refusal(f"registers enter with the projected rows of an image, which {family.title} does not hand out")

    def with_registers(plane: list[Tensor], content: bool) -> list[Tensor]:
        return [image.append_registers(rows, content) for rows, image in zip(plane, images, strict=True)]

    if all(reduction.projected for reduction in reductions):
        reduced = [_entering(image, rows) for image, rows in zip(images, features, strict=True)]
    else:
        patches = [prompt.outputs.patches[prompt.origins[n]] for n in numbers]
        reduced = _merge_before_projector(family, model, features, patches, images)
    reduced = with_registers(reduced, content=True)
    # models that stack equal images read all rows in one line, so that any number of rows fits
    in_line = torch.cat(reduced)[None] if isinstance(rows_of(encoded), Tensor) else reduced
    replace_rows(output, in_line, lambda plane: with_registers(reduce_plane(plane), content=False))
    return output


def _entering(image: ImageReduction, rows: Tensor) -> Tensor:
    """Return the rows of an image that enter the LLM: made by a net, or by W of the projector's ``rows`` `[N, D]`."""
    reduction = image.features
    if reduction.rows is None:
        return reduction.apply(rows)
    if reduction.rows.shape[-1] != rows.shape[-1]:
        width = (
            f"rows of width {reduction.rows.shape[-1]}" if reduction.rows.shape[-1] else "none (JSON leaves them out)"
        )
        raise Refusal(f"the rows of this decision were made by a net, for rows of width {rows.shape[-1]}; got {width}")
    return reduction.rows.to(rows.dtype)


def _merge_before_projector(
    family: Family, model: Any, features: Sequence[Tensor], patches: Sequence[Tensor], images: Sequence[ImageReduction]
) -> list[Tensor]:
    """Merge the rows that enter the projector, and project the merged rows of all images in one call.

    Args:
        features: per image `[N, D]`, the rows that the vision encoder made.
        patches: per image `[M, C]`, the rows that entered the projector.
    """
    entered = [image.layout.insert_separators(rows) for image, rows in zip(images, patches, strict=True)]
    mixed = [image.features.apply(rows) for image, rows in zip(images, entered, strict=True)]
    projected = torch.split(family.project(model, torch.cat(mixed)), [len(rows) for rows in mixed])
    reduced = []
    for image, rows, plane in zip(images, projected, features, strict=True):
        reduction, separator = image.features, image.layout.separator
        if reduction.projected:  # this image's decision is about the projector's outputs
            rows = reduction.apply(plane)
        elif separator is not None:  # separators do not come from the projector
            anchors = reduction.anchors
            rows = plane[anchors].where(separator[anchors][:, None], rows)
        reduced.append(rows)
    return reduced


def kept_placeholders(images: Sequence[ImageReduction]) -> Tensor:
    """Return `[V]` bool, True on those of the batch's V placeholders that stay; all images in order."""
    anchors = [(image.decision.anchors, image.decision.total) for image in images]
    return torch.cat([kept.new_zeros(n, dtype=torch.bool).index_fill(0, kept, True) for kept, n in anchors])


def position_ids(family: Family, base: Any, kwargs: dict[str, Any]) -> Tensor:
    """Return the position ids of the whole prompt, `[B, L]` or `[axes, B, L]`, as the model itself numbers it."""
    if kwargs.get("position_ids") is not None:
        ids_of_caller: Tensor = kwargs["position_ids"]
        return ids_of_caller
    ids = kwargs["input_ids"]
    plain = (torch.arange(ids.shape[1], device=ids.device) + family.first_position).expand(len(ids), -1)
    mrope = getattr(base, "compute_3d_position_ids", None)  # also remembers the model's rope_deltas
    axes = mrope and mrope(**{name: kwargs.get(name) for name in inspect.signature(mrope).parameters})
    # [1 + axes, B, L]: transformers reads the plain ids of an M-RoPE model from a first axis
    return plain if axes is None else torch.cat([plain[None], axes])


def shorten_inputs(
    kwargs: dict[str, Any],
    columns: ColumnSelection,
    positions: Tensor,
    placed: Tensor | None,
    end: int,
    renumbered_rows: Sequence[bool] | None,
    padding_id: int,
) -> PrefixInfo:
    """Shorten every argument that has a column per token, in place; returns the bookkeeping for the cache.

    Args:
        positions: position ids of the whole prompt, `[B, L]` or `[axes, B, L]`.
        placed: those of the new columns, `[…, B, n]`, if they are others.
        end: columns up to and including the last placeholder.
        renumbered_rows: per row, whether its positions are renumbered contiguously; ``None``: all keep their ids.
        padding_id: token id on padding.
    """
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    kwargs["input_ids"] = columns.take(ids, filler=padding_id)
    new_mask = columns.take(torch.ones_like(ids) if mask is None else mask, filler=0)
    # without a cache transformers reads gaps in the positions as packed sequences, unless it is given a mask
    mask_required = mask is not None or columns.padded or kwargs.get("past_key_values") is None
    kwargs["attention_mask"] = new_mask if mask_required else None
    for name, filler in PADDING_OF.items():
        if kwargs.get(name) is not None:
            kwargs[name] = columns.take(kwargs[name], filler)
    as_given = columns.take(positions)
    kept, shift = as_given if placed is None else placed, None
    if renumbered_rows is not None:
        # a row counts on from its own first position; padding must not set it
        first = kept.masked_fill(~columns.valid, torch.iinfo(kept.dtype).max).amin(-1, keepdim=True)
        contiguous = first + (new_mask.long().cumsum(-1) - 1).clamp(min=0)
        if not all(renumbered_rows):  # a row that stayed whole keeps its ids, as it does in a batch of its own
            contiguous = contiguous.where(on_device(renumbered_rows, ids.device)[:, None], kept)
        kept = contiguous
    if kept is not as_given:
        shift = as_given[..., -1:] - kept[..., -1:]  # later tokens follow the last column
    kwargs["position_ids"] = kept
    after_images = ids.shape[1] - end
    prefix_mask = new_mask[:, : new_mask.shape[1] - after_images]
    return PrefixInfo(prefix_mask, columns.padded, end, shift)


def untouched_prefix(kwargs: dict[str, Any], end: int) -> PrefixInfo:
    """Return the bookkeeping of a prompt that enters the LLM whole."""
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    prefix_mask = torch.ones_like(ids[:, :end]) if mask is None else mask[:, :end].long()
    return PrefixInfo(prefix_mask, False, end)


def padding_id(model: Any) -> int:
    """Return a token id for padding columns that is not a placeholder."""
    config = getattr(model, "generation_config", None)
    pad = getattr(config, "pad_token_id", None)
    placeholders = (model.config.image_token_id, getattr(model.config, "video_token_id", None))
    return 0 if pad is None or pad in placeholders else int(pad)
