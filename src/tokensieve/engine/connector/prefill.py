"""Turn the arguments of a prefill into those of a shorter one: check, encode, decide, shorten.

The model then merges text and images natively. Positions, token types, labels, deepstack features and logits are right
because every input was shortened by the same columns.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from tokensieve.budget import BudgetScope, rule_of
from tokensieve.engine.cache import CacheInfo, PrefixInfo, check_cache, moved_back, prefix_of_cache
from tokensieve.engine.connector.decide import ConnectorEvidence, curves_of, decide, with_separators
from tokensieve.engine.connector.images import PromptImages
from tokensieve.engine.connector.registers import RegisterRows, select_with_registers
from tokensieve.engine.connector.shorten import (
    PADDING_OF,
    kept_placeholders,
    padding_id,
    position_ids,
    reduce_features,
    shorten_inputs,
    untouched_prefix,
)
from tokensieve.engine.connector.sizes import bias_of, sized, sizes_after
from tokensieve.engine.handoff import Decisions, EncoderOutputs, ImageReduction, Prefill
from tokensieve.engine.layer_budget import LayerBudget
from tokensieve.engine.prompt.placeholders import ColumnSelection
from tokensieve.engine.prompt.user_text import UserTextFinder
from tokensieve.engine.turns import to_keep
from tokensieve.errors import Refusal
from tokensieve.methods import Method, Positions, Repair
from tokensieve.methods.adaptive import cut
from tokensieve.models import Family, TokenLayout
from tokensieve.models.family import PIXELS, Modality
from tokensieve.models.layout import Separators
from tokensieve.reduction import Reduction
from tokensieve.tokens import UserText


def shows(kwargs: dict[str, Any], modality: Modality) -> bool:
    """Return whether the arguments of a forward hold images (or videos), encoded or not."""
    encoded = kwargs.get("mm_encoder_outputs") or {}
    return encoded.get(modality) is not None or any(kwargs.get(name) is not None for name in PIXELS[modality])


class Connector:
    """The connector stage of one model.

    Args:
        family, model: the top-level model, and its family.
        method: the connector method; ``None`` if only other stages act.
        positions: "original" keeps the position ids of the remaining tokens, "contiguous" renumbers them.
        text_finder: finds the user's words, for methods that read them.
        replay: decisions to apply as they are, instead of a method's.
        scope: the scope of the budget.
        separators: the separators that a reduced image keeps.
        layer_budget: works out ``keep``, if it is an average over the layers of the LLM.
        repair: the repair of attention; it needs the sizes of the tokens.
        net: the net of a trained method.
        registers: makes the registers that enter the LLM behind each image.
        reselect: keep what a later turn needs to be decided anew.
        hands_states: hand the vision encoder's states on to the decoder stage.

    Attributes:
        curves: of each image of the latest prefill, the curve that was cut, if ``keep`` is an average over the data.
        curve_totals: the number of tokens of each of these images.
    """

    def __init__(
        self,
        family: Family,
        model: Any,
        method: Method | None,
        positions: Positions,
        text_finder: UserTextFinder | None,
        replay: Decisions | None,
        scope: BudgetScope,
        separators: Separators,
        layer_budget: LayerBudget | None = None,
        repair: Repair | None = None,
        net: nn.Module | None = None,
        registers: RegisterRows | None = None,
        reselect: bool = False,
        hands_states: bool = False,
    ) -> None:
        self.family, self.model, self.base = family, model, model.base_model
        self.method, self.positions, self.text_finder = method, positions, text_finder
        self.replay, self.scope, self.separators = replay, scope, separators
        self.layer_budget, self.repair, self.net = layer_budget, repair, net
        self.registers, self.reselect, self.hands_states = registers, reselect, hands_states
        self.curves: list[list[float]] = []
        self.curve_totals: list[int] = []

    def prefill(self, kwargs: dict[str, Any], earlier_turns: CacheInfo | None = None) -> Prefill:
        """Shorten a prompt with images or videos.

        Args:
            kwargs: the arguments of the top-level forward.
            earlier_turns: the bookkeeping on the cache, if the prompt is the next turn on a filled cache.

        Raises:
            Refusal: if the prompt cannot be reduced correctly; only the vision encoder has run then.
        """
        self._check(kwargs)
        kwargs, cache = dict(kwargs), kwargs.get("past_key_values")
        earlier = None
        if cache is not None and cache.get_seq_length():
            earlier = self._as_first_turn(kwargs, cache, earlier_turns)
        encoded = kwargs["mm_encoder_outputs"] = self._encode(kwargs)
        whole = to_keep(kwargs) if self.reselect else None
        prompt = self._images(kwargs, encoded)
        images, placeholders = self._decide(kwargs, prompt), prompt.placeholders
        if self.hands_states:
            images = [replace(image, encoder_states=prompt.states(number)) for number, image in enumerate(images)]
        # padding between turns is packed to the left: the bookkeeping then covers every column of the prompt
        end = kwargs["input_ids"].shape[1] if self.reselect else placeholders.end
        if self.repair == "restore":
            images = [image.at_medians() for image in images]
        if self.registers is not None:
            images = self.registers.behind(images, [rows.device for rows in prompt.features])
        per_image = iter(images)
        by_row = [[next(per_image) for _ in sizes] for sizes in placeholders.images]
        videos = prompt.by_modality.get("video", [])
        if all(image.decision.whole for image in images):
            visual, columns, lengths = placeholders.visual, None, placeholders.lengths
            prefix = untouched_prefix(kwargs, end)
        else:
            positions = position_ids(self.family, self.base, kwargs)
            dropped = [sum(image.decision.total - image.decision.slots for image in row) for row in by_row]
            lengths = [length - n for length, n in zip(placeholders.lengths, dropped, strict=True)]
            stay = placeholders.not_padding.masked_scatter(placeholders.visual, kept_placeholders(images))
            if any(image.registers is not None for image in images):
                columns, placed = select_with_registers(stay, placeholders, by_row, positions, lengths)
            else:
                columns, placed = ColumnSelection.of(stay, lengths), None
            for kind, numbers in prompt.by_modality.items():
                encoded[kind] = reduce_features(self.family, self.model, encoded[kind], prompt, images, numbers)
            renumbered_rows = [n != 0 for n in dropped] if self.positions == "contiguous" else None
            padding = padding_id(self.model)
            prefix = shorten_inputs(kwargs, columns, positions, placed, end, renumbered_rows, padding)
            visual = columns.take(placeholders.visual) & columns.valid
            if self.repair is not None:
                bias = bias_of(visual, images, self.repair)
                prefix = replace(prefix, bias=bias[..., : prefix.mask.shape[1]])
        if earlier is not None:
            prefix = self._append(kwargs, prefix, earlier)
        projected = prompt.features if self.method is not None and self.method.changes_text else ()
        return Prefill(
            kwargs, by_row, prompt.copies, visual, placeholders, videos, columns, lengths, prefix, whole, projected
        )

    # -- checks and encoding ------------------------------------------------------------------------------------------

    def _check(self, kwargs: dict[str, Any]) -> None:
        """Refuse arguments that cannot be shortened correctly, before anything runs."""
        if kwargs.get("input_ids") is None:
            raise Refusal("a reduced prompt needs input_ids: inputs_embeds do not show where the images stand")
        for kind in self.family.modalities:
            encoded = (kwargs.get("mm_encoder_outputs") or {}).get(kind)
            if encoded is not None and not hasattr(encoded, EncoderOutputs.ATTRIBUTE):
                raise Refusal(
                    f"these {kind} features were encoded before the method was attached, or in prefill chunks "
                    "(prefill_chunk_size): encode them with the method attached, in one piece"
                )
        check_cache(kwargs.get("past_key_values"))
        handled = {"input_ids", "attention_mask", "position_ids", *PADDING_OF}
        for kind in self.family.modalities:
            handled |= inspect.signature(getattr(self.base, f"get_{kind}_features")).parameters.keys()
        for name, value in kwargs.items():
            if name not in handled and isinstance(value, Tensor) and value.shape[:2] == kwargs["input_ids"].shape:
                raise Refusal(f"{name} has a value per token, and nothing is known about how to shorten it")
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise Refusal(f"attention_mask must be [B, L] for a reduced prompt; got {mask.ndim} dimensions")
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise Refusal("logits_to_keep must be a number for a reduced prompt, not a tensor of columns")

    def _encode(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the encoders' outputs by modality: those that ``generate`` made, else made here in the same way."""
        outputs, consumed = dict(kwargs.get("mm_encoder_outputs") or {}), set()
        for kind in self.family.modalities:
            pixels = PIXELS[kind]
            if all(kwargs.get(name) is None for name in pixels):
                continue
            encode = getattr(self.base, f"get_{kind}_features")
            names = [n for n in inspect.signature(encode).parameters if n in kwargs and n != "kwargs"]
            outputs[kind] = encode(**{n: kwargs[n] for n in names}, return_dict=True)
            consumed |= {*pixels, *(name for name in kwargs if name.startswith("vision_feature_"))}
        for name in consumed:
            kwargs.pop(name, None)
        return outputs

    def _images(self, kwargs: dict[str, Any], encoded: dict[str, Any]) -> PromptImages:
        kinds = [kind for kind in self.family.modalities if encoded.get(kind) is not None]
        config = self.model.config
        by_kind = [PromptImages.of_call(self.family, config, kwargs, kind, encoded[kind]) for kind in kinds]
        return by_kind[0].beside(by_kind[1]) if len(by_kind) > 1 else by_kind[0]

    # -- later turns --------------------------------------------------------------------------------------------------

    def _as_first_turn(self, kwargs: dict[str, Any], cache: Cache, earlier_turns: CacheInfo | None) -> PrefixInfo:
        """Rewrite a later turn's arguments, in place, as if it were the first; returns the bookkeeping of the earlier.

        :meth:`_append` undoes it.
        """
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
        earlier = prefix_of_cache(cache, earlier_turns, mask, rows, ids.device)
        kwargs["position_ids"] = positions if earlier.shift is None else moved_back(positions, earlier.shift)
        kwargs["attention_mask"] = None if mask is None else mask[:, held:]
        return earlier

    def _append(self, kwargs: dict[str, Any], prefix: PrefixInfo, earlier: PrefixInfo) -> PrefixInfo:
        """Put the mask of a turn behind that of the earlier turns, in place; returns the bookkeeping of both."""
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if mask is not None or earlier.padded:
            dropped = earlier.mask.new_zeros(len(ids), earlier.dropped)
            mask = torch.ones_like(ids) if mask is None else mask
            kwargs["attention_mask"] = torch.cat([dropped, earlier.mask, mask], 1)
        return prefix.after(earlier)

    # -- the decision -------------------------------------------------------------------------------------------------

    def _decide(self, kwargs: dict[str, Any], prompt: PromptImages) -> list[ImageReduction]:
        """Return the decision about each image of the (possibly expanded) batch."""
        outputs, origins = prompt.outputs, prompt.origins
        sizes = map(len, prompt.features)
        layouts = [
            replace(_fitting(outputs.layouts[origin], n), separators=self.separators)
            for n, origin in zip(sizes, origins, strict=True)
        ]
        if self.replay is not None:
            placeholders = prompt.placeholders
            replayed = _replayed(self.replay, placeholders.images[:: prompt.copies], placeholders.visual.device)
            by_image = zip(layouts, (replayed[origin] for origin in origins), strict=True)
            images = [ImageReduction(layout, decision, decision) for layout, decision in by_image]
            return images if self.repair is None else sized(images, prompt.features)
        if outputs.reductions is None:
            images = [self._whole(layout, rows.device) for layout, rows in zip(layouts, prompt.features, strict=True)]
        else:  # the vision encoder has merged the rows already: the features need only be picked
            in_encoder = [outputs.reductions[origin] for origin in origins]
            images = [ImageReduction(TokenLayout(r.total), r, Reduction(r.total, r.anchors)) for r in in_encoder]
            images = images if self.repair is None else sized(images)
            layouts = [_fitting(outputs.layouts[i], r.slots) for i, r in zip(origins, in_encoder, strict=True)]
        if self.method is None:
            return images
        if self.method.needs.requests("video") and not any(layout.video for layout in layouts):
            raise Refusal(f"{self.method} reduces videos; there is none in this prompt")
        evidence = self._evidence(kwargs, prompt, images, layouts)
        counts = iter(map(len, evidence.features))
        samples = [[next(counts) for _ in row] for row in prompt.placeholders.images]
        decisions = decide(self.method, self.scope, evidence, samples, self._budgets(evidence, images))
        if self.method.makes_rows:
            received = [image.features.apply(rows) for image, rows in zip(images, prompt.features, strict=True)]
            decisions = list(map(with_separators, decisions, layouts, received))
        after = zip(images, decisions, sizes_after(images, decisions, prompt.features, layouts), strict=True)
        return [image.then_connector(decision, sizes_left) for image, decision, sizes_left in after]

    def _whole(self, layout: TokenLayout, device: torch.device) -> ImageReduction:
        whole = Reduction.identity(layout.total, device=device, grid=layout.grid)
        sizes = None if self.repair is None else torch.ones(layout.total, device=device)
        return ImageReduction(layout, whole, whole, sizes=sizes)

    def _budgets(self, evidence: ConnectorEvidence, images: list[ImageReduction]) -> list[int] | None:
        """Return the tokens to keep of each image, if ``keep`` is a rule; ``None`` for a number."""
        assert self.method is not None
        rule = rule_of(self.method.budget)
        if rule is None:
            return None
        received = [layout.patches for layout in evidence.layouts]
        if self.layer_budget is not None and rule.mean == "layers":
            return list(map(self.layer_budget.entering, (image.layout.patches for image in images), received))
        if rule.threshold is None:
            raise ValueError("a rule without a threshold is refused when the method is attached")
        self.curves, self.curve_totals = curves_of(rule, self.method, evidence), received
        by_image = zip(self.curves, received, strict=True)
        return [cut(curve, rule.threshold, rule.wanted, total) for curve, total in by_image]

    def _evidence(
        self, kwargs: dict[str, Any], prompt: PromptImages, images: list[ImageReduction], layouts: list[TokenLayout]
    ) -> ConnectorEvidence:
        """Return the rows of the patches that the vision encoder left, without separators, and the user's words."""
        placeholders, outputs, text = prompt.placeholders, prompt.outputs, None
        if self.text_finder is not None:
            between_frames = placeholders.between(prompt.by_modality.get("video", []))
            text = UserText(*self.text_finder.embedded(kwargs["input_ids"], between_frames))
        features = []
        for image, rows, layout in zip(images, prompt.features, layouts, strict=True):
            rows = image.features.apply(rows)
            features.append(rows if layout.patch_index is None else rows[layout.patch_index])
        patches = [outputs.patches[origin] for origin in prompt.origins] if outputs.patches else []
        if outputs.reductions is not None:  # not strict: there are no patches if they were not requested
            patches = [image.features.apply(rows) for image, rows in zip(images, patches, strict=False)]
        row_of = [row for row, sizes in enumerate(placeholders.images) for _ in sizes]
        project = partial(self.family.project, self.model)
        return ConnectorEvidence(layouts, features, patches, outputs, prompt.origins, text, row_of, project, self.net)


def _fitting(layout: TokenLayout, total: int) -> TokenLayout:
    """Return the layout, if it is one of ``total`` tokens; else only their number is known."""
    return layout if layout.total == total else TokenLayout(total)


def _replayed(decisions: Decisions, images: list[list[int]], device: torch.device) -> list[Reduction]:
    """Return the decisions about all images in order, on their device (decisions from a file are on the CPU)."""
    sizes = [[decision.total for decision in row] for row in decisions]
    if sizes != images:
        raise Refusal(f"the decisions to replay are for images of {sizes} tokens; the batch has {images}")
    return [decision.to(device) for row in decisions for decision in row]
