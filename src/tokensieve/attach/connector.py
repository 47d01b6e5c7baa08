"""The connector stage: decide which visual tokens enter the LLM, and shorten the top-level forward accordingly.

The model then merges text and images natively: positions, token types, labels, deepstack features and logits are
right because every input was shortened by the same columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokensieve.attach.cache import State, check_cache
from tokensieve.attach.encoder import RECORD, Record, evidence
from tokensieve.attach.layout import Columns, Layout, equal_groups
from tokensieve.attach.words import UserWords
from tokensieve.methods import Method, Positions
from tokensieve.reduction import Reduction

Decisions = list[list[Reduction]]


@dataclass(frozen=True)
class Plan:
    """What became of one image.

    Attributes:
        decision: what the encoder and connector stages decided, in terms of its original tokens.
        features: what to do to the rows that the encoder made.
        inside: what each decoder stage did to the rows it was given.
    """

    decision: Reduction
    features: Reduction
    inside: tuple[Reduction, ...] = ()

    def then(self, following: Reduction) -> Plan:
        """With a connector's decision about what is left."""
        if self.decision.whole and not self.decision.notes:
            return Plan(following, following)
        return Plan(following.after(self.decision), following.after(self.features))

    def then_inside(self, following: Reduction) -> Plan:
        """With a decoder stage's decision about what is left."""
        return replace(self, inside=(*self.inside, following))

    @property
    def reduced_inside(self) -> bool:
        return any(stage.slots < stage.total for stage in self.inside)

    @property
    def anchors(self) -> Tensor:
        """Original indices of the tokens that are left."""
        anchors = self.decision.anchors
        for stage in self.inside:
            anchors = anchors[stage.anchors]
        return anchors

    def reduce_inside(self, rows: Tensor) -> Tensor:
        """What the decoder stages made of rows that entered the LLM."""
        for stage in self.inside:
            rows = stage.apply(rows)
        return rows

    def final(self) -> Reduction:
        """All stages as one decision in terms of the original tokens."""
        decision = self.decision
        for stage in self.inside:
            decision = stage.after(decision)
        return decision


@dataclass(frozen=True)
class Prefill:
    """A prompt as it enters the LLM.

    Attributes:
        kwargs: the top-level forward's arguments.
        plans: `[row][image]`; beams and several returns repeat a sample's row ``copies`` times.
        visual: `[B, n]` bool, True on visual tokens.
        lengths: per row, the columns that are no padding.
        state: what a cache must remember.
    """

    kwargs: dict[str, Any]
    plans: list[list[Plan]]
    copies: int
    visual: Tensor
    lengths: list[int]
    state: State


class Connector:
    """Turns the arguments of a prefill into those of a shorter one.

    Args:
        model: the top-level model.
        method: the connector method; ``None`` when only an encoder method acts.
        positions: "original" keeps the survivors' position ids, "contiguous" renumbers.
        words: finds the user's words, for methods that read them.
        replay: decisions to apply as they are, instead of a method's.
    """

    def __init__(
        self, model: Any, method: Method | None, positions: Positions, words: UserWords | None, replay: Decisions | None
    ) -> None:
        self.model, self.base = model, model.base_model
        self.method, self.positions, self.words, self.replay = method, positions, words, replay

    def prefill(self, kwargs: dict[str, Any]) -> Prefill:
        """Shorten a prompt with images.

        Raises:
            ValueError: for what cannot be done right; nothing has run then but the vision tower.
        """
        self._check(kwargs)
        kwargs = dict(kwargs)
        encoded = self._encode(kwargs)
        features = list(encoded.pooler_output)
        ids, mask, token = kwargs["input_ids"], kwargs.get("attention_mask"), self.model.config.image_token_id
        layout = Layout.read(ids, mask, token, [len(f) for f in features])
        origins, copies = _origins(layout.images, len(getattr(encoded, RECORD).grids))
        plans = self._decide(kwargs, encoded, features, layout, origins)
        by_row = _by_row(plans, layout.images)
        kwargs["mm_encoder_outputs"] = {**(kwargs.get("mm_encoder_outputs") or {}), "image": encoded}
        if all(plan.decision.whole for plan in plans):
            return Prefill(kwargs, by_row, copies, layout.visual, layout.lengths, _untouched(kwargs, layout.end))

        positions = self._positions(kwargs)
        stay = layout.real.masked_scatter(layout.visual, _kept(plans))
        lost = [sum(p.decision.total - p.decision.slots for p in row) for row in by_row]
        lengths = [n - gone for n, gone in zip(layout.lengths, lost, strict=True)]
        columns = Columns.of(stay, lengths)
        kwargs["mm_encoder_outputs"]["image"] = _reduced(encoded, [plan.features for plan in plans])
        reduced = [any(not p.decision.whole for p in row) for row in by_row]
        state = self._shorten(kwargs, columns, positions, layout.end, reduced)
        return Prefill(kwargs, by_row, copies, columns.take(layout.visual) & columns.valid, lengths, state)

    # -- checks and encoding ------------------------------------------------------------------------------------------

    def _check(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("input_ids") is None:
            raise ValueError("a reduced prompt needs input_ids: inputs_embeds do not show where the images stand")
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None and not hasattr(encoded, RECORD):
            raise ValueError(
                "these image features were encoded before the method was attached, or in prefill chunks "
                "(prefill_chunk_size): encode them with the method attached, in one piece"
            )
        check_cache(kwargs.get("past_key_values"))
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask must be [B, L] for a reduced prompt; got {mask.ndim} dimensions")
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise ValueError("logits_to_keep must be a number for a reduced prompt, not a tensor of columns")

    def _encode(self, kwargs: dict[str, Any]) -> Any:
        """The tower's output with projected features: the one generate() made, or made here as generate() does."""
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:
            return encoded
        encode = self.base.get_image_features
        names = [n for n in inspect.signature(encode).parameters if n in kwargs and n != "kwargs"]
        encoded = encode(**{n: kwargs[n] for n in names}, return_dict=True)
        for name in ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy"):
            kwargs.pop(name, None)
        return encoded

    # -- the decision -------------------------------------------------------------------------------------------------

    def _decide(
        self, kwargs: dict[str, Any], encoded: Any, features: list[Tensor], layout: Layout, origins: list[int]
    ) -> list[Plan]:
        """One plan per image of the (possibly expanded) batch."""
        record: Record = getattr(encoded, RECORD)
        if self.replay is not None:
            decisions = _replayed(self.replay, layout.images[:: len(origins) // len(record.grids)])
            return [Plan(decisions[origin], decisions[origin]) for origin in origins]
        if record.reductions is None:
            plans = [_whole(f, record.grids[origin]) for f, origin in zip(features, origins, strict=True)]
        else:  # the encoder made the slots' rows itself: the decision says from what, the features are only picked
            before = [record.reductions[origin] for origin in origins]
            plans = [Plan(r, Reduction(r.total, r.anchors)) for r in before]
        if self.method is None:
            return plans
        rows = [row for row, sizes in enumerate(layout.images) for _ in sizes]
        text, real = self.words.embedded(kwargs["input_ids"]) if self.words is not None else (None, None)
        features = [plan.features.apply(f) for plan, f in zip(plans, features, strict=True)]
        for images in equal_groups([(len(f), record.grids[i]) for f, i in zip(features, origins, strict=True)]):
            stacked, of = torch.stack([features[image] for image in images]), [rows[image] for image in images]
            words = (None, None) if text is None or real is None else (text[of], real[of])
            tokens = evidence(record, [origins[image] for image in images], stacked, *words)
            for image, decision in zip(images, self.method(tokens), strict=True):
                plans[image] = plans[image].then(decision)
        return plans

    # -- shortening ---------------------------------------------------------------------------------------------------

    def _positions(self, kwargs: dict[str, Any]) -> Tensor:
        """Position ids of the whole prompt, as the model itself would number it."""
        if kwargs.get("position_ids") is not None:
            given: Tensor = kwargs["position_ids"]
            return given
        ids = kwargs["input_ids"]
        plain = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        number = getattr(self.base, "compute_3d_position_ids", None)  # M-RoPE; also remembers its rope_deltas
        axes = number and number(**{name: kwargs.get(name) for name in inspect.signature(number).parameters})
        return plain if axes is None else torch.cat([plain[None], axes])

    def _shorten(
        self, kwargs: dict[str, Any], columns: Columns, positions: Tensor, end: int, reduced: list[bool]
    ) -> State:
        """Shorten everything that has a column per token, in place; returns what the cache must remember."""
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        kwargs["input_ids"] = columns.take(ids, filler=_padding_id(self.model))
        new_mask = columns.take(torch.ones_like(ids) if mask is None else mask, filler=0)
        # Without a cache transformers reads gaps in the positions as packed sequences, unless it is given a mask.
        needed = mask is not None or columns.padded or kwargs.get("past_key_values") is None
        kwargs["attention_mask"] = new_mask if needed else None
        for name, filler in (("mm_token_type_ids", 0), ("token_type_ids", 0), ("labels", -100)):
            if kwargs.get(name) is not None:
                kwargs[name] = columns.take(kwargs[name], filler)
        taken, shift = columns.take(positions), None
        if self.positions == "contiguous":
            numbered = (new_mask.long().cumsum(-1) - 1).clamp(min=0).expand_as(taken)
            if not all(reduced):  # a row that stayed whole keeps its ids, as it does in a batch of its own
                numbered = numbered.where(torch.tensor(reduced, device=ids.device)[:, None], taken)
            shift, taken = taken[..., -1:] - numbered[..., -1:], numbered
        kwargs["position_ids"] = taken
        tail = ids.shape[1] - end
        prefix = new_mask[:, : new_mask.shape[1] - tail]
        return State(prefix, columns.padded, end, shift)


def _reduced(encoded: Any, reductions: Sequence[Reduction]) -> Any:
    """A copy of the tower's output with every feature plane reduced; the original may be used again."""
    out = type(encoded)(**dict(encoded.items()))

    def apply(planes: Any) -> list[Tensor]:
        return [reduction.apply(plane) for plane, reduction in zip(planes, reductions, strict=True)]

    out.pooler_output = apply(encoded.pooler_output)
    if getattr(encoded, "deepstack_features", None) is not None:
        out.deepstack_features = [apply(level) for level in encoded.deepstack_features]
    return out


def _whole(features: Tensor, grid: tuple[int, int]) -> Plan:
    total = len(features)
    whole = Reduction.identity(total, device=features.device, grid=grid if grid[0] * grid[1] == total else None)
    return Plan(whole, whole)


def _kept(plans: Sequence[Plan]) -> Tensor:
    """Which placeholders stay, all images in order, bool."""
    kept = [plan.decision.anchors.new_zeros(plan.decision.total, dtype=torch.bool) for plan in plans]
    return torch.cat([k.index_fill(0, p.decision.anchors, True) for k, p in zip(kept, plans, strict=True)])


def _untouched(kwargs: dict[str, Any], end: int) -> State:
    """The state of a prompt that enters the LLM whole."""
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    prefix = torch.ones_like(ids[:, :end]) if mask is None else mask[:, :end].long()
    return State(prefix, False, end, None)


def _by_row(plans: list[Plan], images: list[list[int]]) -> list[list[Plan]]:
    flat = iter(plans)
    return [[next(flat) for _ in sizes] for sizes in images]


def _origins(images: list[list[int]], encoded: int) -> tuple[list[int], int]:
    """Index in the tower call of each image in the batch, and how often beams or several returns repeat a sample."""
    total = sum(map(len, images))
    copies = total // encoded if encoded else 1
    if copies * encoded != total:
        raise ValueError(f"the batch shows {total} images; the encoder saw {encoded}")
    origins, first = [], 0
    for row in images[::copies]:
        origins += list(range(first, first + len(row))) * copies
        first += len(row)
    return origins, copies


def _replayed(decisions: Decisions, images: list[list[int]]) -> list[Reduction]:
    if [[r.total for r in row] for row in decisions] != images:
        shapes = [[r.total for r in row] for row in decisions]
        raise ValueError(f"the decisions to replay are for images of {shapes} tokens; the batch has {images}")
    return [reduction for row in decisions for reduction in row]


def _padding_id(model: Any) -> int:
    """An id for padding columns that is no image placeholder."""
    config = getattr(model, "generation_config", None)
    pad = getattr(config, "pad_token_id", None)
    return 0 if pad is None or pad == model.config.image_token_id else int(pad)
