"""The connector stage: decide which visual tokens enter the LLM, and shorten the top-level forward accordingly.

The model then merges text and images natively: positions, token types, labels, deepstack features and logits are
right because every input was shortened by the same columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokensieve.engine.cache import CacheInfo, PrefixInfo, all_of, check_cache
from tokensieve.engine.connector.decide import DecisionUnit, Scope, decide
from tokensieve.engine.connector.images import PromptImages
from tokensieve.engine.encoder.hooks import RECORD, evidence
from tokensieve.engine.prompt.placeholders import ColumnSelection, Placeholders, on_device
from tokensieve.engine.prompt.user_text import UserTextFinder
from tokensieve.errors import Refusal
from tokensieve.methods import Method, Positions
from tokensieve.models import Family, TokenLayout
from tokensieve.reduction import Reduction
from tokensieve.tokens import VisualTokens

Decisions = list[list[Reduction]]
PER_TOKEN = {"mm_token_type_ids": 0, "token_type_ids": 0, "labels": -100}  # and what stands on padding
PIXELS = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}


@dataclass(frozen=True)
class ImageReduction:
    """What became of one image.

    Attributes:
        shape: how its original tokens lie.
        decision: what the encoder and connector stages decided, in terms of its original tokens.
        features: what to do to the rows that the encoder made.
        inside: what each decoder stage did to the rows it was given.
        ranked: what the connector method ranked the tokens by that entered the LLM, if it did.
    """

    shape: TokenLayout
    decision: Reduction
    features: Reduction
    inside: tuple[Reduction, ...] = ()
    ranked: Tensor | None = None

    def then(self, following: Reduction) -> ImageReduction:
        """With a connector's decision about what is left."""
        if self.decision.whole and not self.decision.notes:
            return ImageReduction(self.shape, following, following, ranked=following.ranking)
        return ImageReduction(
            self.shape, following.after(self.decision), following.after(self.features), ranked=following.ranking
        )

    def then_inside(self, following: Reduction) -> ImageReduction:
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

    @property
    def left(self) -> TokenLayout:
        """How the tokens that are left lie."""
        if self.shape.places is None:
            return TokenLayout((self.inside[-1] if self.inside else self.decision).slots)
        return self.shape.left(self.anchors)

    @cached_property
    def entered(self) -> int:
        """Patches that entered the LLM: what budgets of decoder methods are shares of."""
        if self.shape.places is None:
            return self.decision.slots
        return self.shape.left(self.decision.anchors).patches

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
        layout: of the whole prompt.
        videos: which of its images are videos.
        columns: those of the whole prompt that are left; ``None``: all.
        lengths: per row, the columns that are no padding.
        state: what a cache must remember.
    """

    kwargs: dict[str, Any]
    plans: list[list[ImageReduction]]
    copies: int
    visual: Tensor
    layout: Placeholders
    videos: list[int]
    columns: ColumnSelection | None
    lengths: list[int]
    state: PrefixInfo

    def between_frames(self) -> Tensor | None:
        """`[B, n]` bool, True between the frames of a video, where nobody speaks; ``None``: there is no video."""
        inside = self.layout.between(self.videos)
        return inside if inside is None or self.columns is None else self.columns.take(inside)


class Connector:
    """Turns the arguments of a prefill into those of a shorter one.

    Args:
        family, model: the top-level model, and what is known of it.
        method: the connector method; ``None`` when only others act.
        positions: "original" keeps the survivors' position ids, "contiguous" renumbers.
        words: finds the user's words, for methods that read them.
        replay: decisions to apply as they are, instead of a method's.
        scope: what a budget is for.
    """

    def __init__(
        self,
        family: Family,
        model: Any,
        method: Method | None,
        positions: Positions,
        words: UserTextFinder | None,
        replay: Decisions | None,
        scope: Scope = "image",
    ) -> None:
        self.family, self.model, self.base = family, model, model.base_model
        self.method, self.positions, self.words, self.replay, self.scope = method, positions, words, replay, scope

    def prefill(self, kwargs: dict[str, Any], states: CacheInfo | None = None) -> Prefill:
        """Shorten a prompt with images or videos: a first one, or the next turn on a cache that has these ``states``.

        Raises:
            ValueError: for what cannot be done right; nothing has run then but the vision tower.
        """
        self._check(kwargs)
        kwargs, cache = dict(kwargs), kwargs.get("past_key_values")
        earlier = None
        if cache is not None and cache.get_seq_length():
            earlier = self._next_turn(kwargs, cache, states)
        encoded = kwargs["mm_encoder_outputs"] = self._encode(kwargs)
        kinds = [kind for kind in self.family.modalities if encoded.get(kind) is not None]
        every = [PromptImages.read(self.family, self.model.config, kwargs, kind, encoded[kind]) for kind in kinds]
        shown = every[0].beside(every[1]) if len(every) > 1 else every[0]
        layout, videos, plans = shown.layout, shown.groups.get("video", []), self._decide(kwargs, shown)
        by_row = _by_row(plans, layout.images)
        if all(plan.decision.whole for plan in plans):
            state = _untouched(kwargs, layout.end)
            if earlier is not None:
                state = self._append(kwargs, state, earlier)
            return Prefill(kwargs, by_row, shown.copies, layout.visual, layout, videos, None, layout.lengths, state)

        positions = self._positions(kwargs)
        stay = layout.real.masked_scatter(layout.visual, _kept(plans))
        lost = [sum(p.decision.total - p.decision.slots for p in row) for row in by_row]
        lengths = [n - gone for n, gone in zip(layout.lengths, lost, strict=True)]
        columns = ColumnSelection.of(stay, lengths)
        for kind, images in shown.groups.items():
            encoded[kind] = self._reduced(encoded[kind], shown, plans, images)
        reduced = [gone > 0 for gone in lost]
        state = self._shorten(kwargs, columns, positions, layout.end, reduced)
        if earlier is not None:
            state = self._append(kwargs, state, earlier)
        visual = columns.take(layout.visual) & columns.valid
        return Prefill(kwargs, by_row, shown.copies, visual, layout, videos, columns, lengths, state)

    # -- checks and encoding ------------------------------------------------------------------------------------------

    def _check(self, kwargs: dict[str, Any]) -> None:
        if kwargs.get("input_ids") is None:
            raise Refusal("a reduced prompt needs input_ids: inputs_embeds do not show where the images stand")
        for kind in self.family.modalities:
            encoded = (kwargs.get("mm_encoder_outputs") or {}).get(kind)
            if encoded is not None and not hasattr(encoded, RECORD):
                raise Refusal(
                    f"these {kind} features were encoded before the method was attached, or in prefill chunks "
                    "(prefill_chunk_size): encode them with the method attached, in one piece"
                )
        check_cache(kwargs.get("past_key_values"))
        known = {"input_ids", "attention_mask", "position_ids", *PER_TOKEN}
        for kind in self.family.modalities:
            known |= inspect.signature(getattr(self.base, f"get_{kind}_features")).parameters.keys()
        for name, value in kwargs.items():
            if name not in known and isinstance(value, Tensor) and value.shape[:2] == kwargs["input_ids"].shape:
                raise Refusal(f"{name} has a value per token, and nothing is known about how to shorten it")
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise Refusal(f"attention_mask must be [B, L] for a reduced prompt; got {mask.ndim} dimensions")
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise Refusal("logits_to_keep must be a number for a reduced prompt, not a tensor of columns")

    def _encode(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """By modality, the towers' outputs with projected features: generate() made them, or they are made likewise."""
        outputs, done = dict(kwargs.get("mm_encoder_outputs") or {}), set()
        for kind in self.family.modalities:
            pixels = PIXELS[kind]
            if all(kwargs.get(name) is None for name in pixels):
                continue
            encode = getattr(self.base, f"get_{kind}_features")
            names = [n for n in inspect.signature(encode).parameters if n in kwargs and n != "kwargs"]
            outputs[kind] = encode(**{n: kwargs[n] for n in names}, return_dict=True)
            done |= {*pixels, "vision_feature_layer", "vision_feature_select_strategy"}
        for name in done:
            kwargs.pop(name, None)
        return outputs

    # -- later turns --------------------------------------------------------------------------------------------------

    def _next_turn(self, kwargs: dict[str, Any], cache: Cache, states: CacheInfo | None) -> PrefixInfo:
        """Put a turn's arguments, in place, as if it were the first; returns the state of what stands before it."""
        ids, mask, held = kwargs["input_ids"], kwargs.get("attention_mask"), cache.get_seq_length()
        rows, new = ids.shape
        if mask is not None and mask.shape[1] != held + new:
            raise Refusal(
                f"attention_mask must cover the {held} columns in the cache and the {new} new ones; got {mask.shape[1]}"
            )
        positions = kwargs.get("position_ids")
        if positions is None:
            if hasattr(self.base, "get_rope_index"):
                raise Refusal("new images on a filled cache with M-RoPE: pass position_ids")
            positions = (torch.arange(new, device=ids.device) + held + self.family.first_position).expand(rows, -1)
        earlier = all_of(cache, states, mask, rows, ids.device)
        kwargs["position_ids"] = positions if earlier.shift is None else positions - earlier.shift
        kwargs["attention_mask"] = None if mask is None else mask[:, held:]
        return earlier

    def _append(self, kwargs: dict[str, Any], state: PrefixInfo, earlier: PrefixInfo) -> PrefixInfo:
        """Put the mask of a turn behind that of what stands before it, in place; returns the state of both."""
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if mask is not None or earlier.padded:
            absent = earlier.mask.new_zeros(len(ids), earlier.dropped)
            mask = torch.ones_like(ids) if mask is None else mask
            kwargs["attention_mask"] = torch.cat([absent, earlier.mask, mask], 1)
        return state.after(earlier)

    # -- the decision -------------------------------------------------------------------------------------------------

    def _decide(self, kwargs: dict[str, Any], shown: PromptImages) -> list[ImageReduction]:
        """One plan per image of the (possibly expanded) batch."""
        layout, record, features, origins = shown.layout, shown.record, shown.features, shown.origins
        shapes = [_fitting(record.shapes[o], len(f)) for f, o in zip(features, origins, strict=True)]
        if self.replay is not None:
            decisions = _replayed(self.replay, layout.images[:: shown.copies], layout.visual.device)
            return [ImageReduction(shape, decisions[o], decisions[o]) for shape, o in zip(shapes, origins, strict=True)]
        if record.reductions is None:
            plans = [_whole(shape, f.device) for shape, f in zip(shapes, features, strict=True)]
        else:  # the encoder made the slots' rows itself: the decision says from what, the features are only picked
            before = [record.reductions[origin] for origin in origins]
            plans = [ImageReduction(TokenLayout(r.total), r, Reduction(r.total, r.anchors)) for r in before]
            shapes = [_fitting(record.shapes[o], r.slots) for o, r in zip(origins, before, strict=True)]
        if self.method is None:
            return plans
        if self.method.needs.video and not any(shape.video for shape in shapes):
            raise Refusal(f"{self.method} reduces videos; there is none in this prompt")
        decided = self._ask(self.method, kwargs, shown, plans, shapes)
        return [plan.then(decision) for plan, decision in zip(plans, decided, strict=True)]

    def _ask(
        self,
        method: Method,
        kwargs: dict[str, Any],
        shown: PromptImages,
        plans: list[ImageReduction],
        shapes: list[TokenLayout],
    ) -> list[Reduction]:
        """What the method decides about the rows of each image that the encoder left, structure rows put back."""
        layout, record, origins, text, real = shown.layout, shown.record, shown.origins, None, None
        if self.words is not None:
            text, real = self.words.embedded(kwargs["input_ids"], layout.between(shown.groups.get("video", [])))
        rows = [row for row, sizes in enumerate(layout.images) for _ in sizes]
        both = zip(plans, shown.features, shapes, strict=True)
        left = [_patches(plan.features.apply(features), shape) for plan, features, shape in both]
        entered = [record.patches[origin] for origin in origins] if record.patches else []
        if record.reductions is not None:
            entered = [plan.features.apply(own) for plan, own in zip(plans, entered, strict=False)]

        def see(members: list[DecisionUnit]) -> VisualTokens:
            said, heard = None, None
            if text is not None and real is not None:
                of = on_device([rows[part.image] for part in members], text.device)
                said, heard = text[of], real[of]
            stacked = torch.stack([left[part.image][part.where] for part in members])
            patches = torch.stack([entered[part.image][part.where] for part in members]) if entered else None
            where = [(origins[part.image], part.where) for part in members]
            first = members[0]
            tokens = evidence(record, where, stacked, patches, said, heard, first.grid, first.frames)
            if first.tiled is not None:
                tile = torch.stack([part.tiled.tile for part in members if part.tiled and part.tiled.tile is not None])
                tokens = replace(tokens, tile=tile, tiles=first.tiled.tiles, views=first.tiled.views)
            return tokens

        sizes = iter(map(len, left))
        samples = [[next(sizes) for _ in images] for images in layout.images]
        of_image = decide(method, self.scope, shapes, samples, see)
        return [shape.merge_parts(decisions) for shape, decisions in zip(shapes, of_image, strict=True)]

    def _reduced(self, encoded: Any, shown: PromptImages, plans: list[ImageReduction], images: list[int]) -> Any:
        """A copy of the encoder's output with every feature plane reduced; the original may be used again."""
        features, plans = [shown.features[image] for image in images], [plans[image] for image in images]
        origins, record = [shown.origins[image] for image in images], shown.record
        out, reductions = type(encoded)(**dict(encoded.items())), [plan.features for plan in plans]

        def apply(planes: Any) -> list[Tensor]:
            return [reduction.apply(plane) for plane, reduction in zip(planes, reductions, strict=True)]

        if all(reduction.projected for reduction in reductions):
            reduced = apply(features)
        else:
            shapes = [plan.shape for plan in plans]
            entered = [shape.spread(record.patches[o]) for shape, o in zip(shapes, origins, strict=True)]
            mixed = [r.apply(rows) for r, rows in zip(reductions, entered, strict=True)]
            rows = torch.split(self.family.project(self.model, torch.cat(mixed)), [len(rows) for rows in mixed])
            reduced = []
            for reduction, own, plane, shape in zip(reductions, rows, features, shapes, strict=True):
                if reduction.projected:
                    own = reduction.apply(plane)
                elif shape.structure is not None:  # no patch of the projector's stands behind these rows
                    stays = reduction.anchors
                    own = plane[stays].where(shape.structure[stays][:, None], own)
                reduced.append(own)
        # models that stack equal images look at all rows in a line, so any number of rows fits
        out.pooler_output = torch.cat(reduced)[None] if isinstance(encoded.pooler_output, Tensor) else reduced
        if getattr(encoded, "deepstack_features", None) is not None:
            out.deepstack_features = [apply(level) for level in encoded.deepstack_features]
        return out

    # -- shortening ---------------------------------------------------------------------------------------------------

    def _positions(self, kwargs: dict[str, Any]) -> Tensor:
        """Position ids of the whole prompt, as the model itself would number it."""
        if kwargs.get("position_ids") is not None:
            given: Tensor = kwargs["position_ids"]
            return given
        ids = kwargs["input_ids"]
        plain = (torch.arange(ids.shape[1], device=ids.device) + self.family.first_position).expand(len(ids), -1)
        number = getattr(self.base, "compute_3d_position_ids", None)  # M-RoPE; also remembers its rope_deltas
        axes = number and number(**{name: kwargs.get(name) for name in inspect.signature(number).parameters})
        return plain if axes is None else torch.cat([plain[None], axes])

    def _shorten(
        self, kwargs: dict[str, Any], columns: ColumnSelection, positions: Tensor, end: int, reduced: list[bool]
    ) -> PrefixInfo:
        """Shorten everything that has a column per token, in place; returns what the cache must remember."""
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        kwargs["input_ids"] = columns.take(ids, filler=_padding_id(self.model))
        new_mask = columns.take(torch.ones_like(ids) if mask is None else mask, filler=0)
        # Without a cache transformers reads gaps in the positions as packed sequences, unless it is given a mask.
        needed = mask is not None or columns.padded or kwargs.get("past_key_values") is None
        kwargs["attention_mask"] = new_mask if needed else None
        for name, filler in PER_TOKEN.items():
            if kwargs.get(name) is not None:
                kwargs[name] = columns.take(kwargs[name], filler)
        taken, shift = columns.take(positions), None
        if self.positions == "contiguous":
            first = taken.masked_fill(~columns.valid, torch.iinfo(taken.dtype).max).amin(-1, keepdim=True)
            numbered = first + (new_mask.long().cumsum(-1) - 1).clamp(min=0)
            if not all(reduced):  # a row that stayed whole keeps its ids, as it does in a batch of its own
                numbered = numbered.where(torch.tensor(reduced, device=ids.device)[:, None], taken)
            shift, taken = taken[..., -1:] - numbered[..., -1:], numbered
        kwargs["position_ids"] = taken
        tail = ids.shape[1] - end
        prefix = new_mask[:, : new_mask.shape[1] - tail]
        return PrefixInfo(prefix, columns.padded, end, shift)


def _fitting(shape: TokenLayout, total: int) -> TokenLayout:
    """The shape, if it is one of ``total`` tokens; else nothing is known but their number."""
    return shape if shape.total == total else TokenLayout(total)


def _patches(rows: Tensor, shape: TokenLayout) -> Tensor:
    """Those of an image's rows that belong to patches."""
    return rows if shape.places is None else rows[shape.places]


def _whole(shape: TokenLayout, device: torch.device) -> ImageReduction:
    whole = Reduction.identity(shape.total, device=device, grid=shape.grid)
    return ImageReduction(shape, whole, whole)


def _kept(plans: Sequence[ImageReduction]) -> Tensor:
    """Which placeholders stay, all images in order, bool."""
    kept = [plan.decision.anchors.new_zeros(plan.decision.total, dtype=torch.bool) for plan in plans]
    return torch.cat([k.index_fill(0, p.decision.anchors, True) for k, p in zip(kept, plans, strict=True)])


def _untouched(kwargs: dict[str, Any], end: int) -> PrefixInfo:
    """The state of a prompt that enters the LLM whole."""
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    prefix = torch.ones_like(ids[:, :end]) if mask is None else mask[:, :end].long()
    return PrefixInfo(prefix, False, end, None)


def _by_row(plans: list[ImageReduction], images: list[list[int]]) -> list[list[ImageReduction]]:
    flat = iter(plans)
    return [[next(flat) for _ in sizes] for sizes in images]


def _replayed(decisions: Decisions, images: list[list[int]], device: torch.device) -> list[Reduction]:
    """The decisions about all images in order, on their device: what was loaded from a file is not on a GPU."""
    if [[r.total for r in row] for row in decisions] != images:
        shapes = [[r.total for r in row] for row in decisions]
        raise Refusal(f"the decisions to replay are for images of {shapes} tokens; the batch has {images}")
    return [reduction.to(device) for row in decisions for reduction in row]


def _padding_id(model: Any) -> int:
    """An id for padding columns that is no placeholder."""
    config = getattr(model, "generation_config", None)
    pad = getattr(config, "pad_token_id", None)
    placeholders = (model.config.image_token_id, getattr(model.config, "video_token_id", None))
    return 0 if pad is None or pad in placeholders else int(pad)
