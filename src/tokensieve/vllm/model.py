"""The worker half: the encoder runs whole, the method decides, and only what stays goes on to the LLM.

This module defines a class for each family on first use. It is vLLM's own class with :class:`Reduced` mixed in.

Positions: with "contiguous", vLLM's own are right. With "original", the positions that vLLM asks the model for leave
room for all tokens of an image, so that those of later text and of the answer are final before the encoder has run. How
far each kept token stands from the image's first travels with its embedding in a few more columns. They are added to
the positions in the step that prefills these tokens. Nothing of this runs while an answer is decoded.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from vllm.multimodal import MULTIMODAL_REGISTRY

from tokensieve.engine.connector.decide import ConnectorEvidence, decide
from tokensieve.engine.encoder.hooks import RECEIVED_FOR_CLS
from tokensieve.engine.handoff import EncoderOutputs
from tokensieve.errors import Refusal
from tokensieve.models import TokenLayout
from tokensieve.ops import pixel_hash
from tokensieve.reduction import Reduction
from tokensieve.tokens import UserText
from tokensieve.vllm import private
from tokensieve.vllm.evidence import EncoderReader
from tokensieve.vllm.families import FAMILIES, ServedFamily
from tokensieve.vllm.memory import Decisions
from tokensieve.vllm.plan import PLAN, SPAN, WORDS, ImagePlan
from tokensieve.vllm.processor import can_extend_table, reduced_processor
from tokensieve.vllm.settings import EngineSettings

DIGIT = 128
"""The base in which offsets are written: bfloat16 holds whole numbers up to 256 exactly."""


class Reduced:
    """Mixed in before a model class of vLLM's."""

    family: ClassVar[ServedFamily]
    supports_mrope: ClassVar[bool] = True
    # the frontend normalises pixels: methods tell images apart by the numbers that transformers' processor makes
    supports_mm_device_do_normalize: ClassVar[bool] = False
    config: Any
    get_language_model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        self.settings = EngineSettings.of_config(config)
        check_engine(vllm_config, self.settings)
        rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
        # the sections make vLLM ask this class for positions; the LLM itself keeps its plain RoPE
        sections = None if self.family.mrope else rope.pop("mrope_section", None)
        text = config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None)
        if longest and self.moves and not self.family.mrope and can_extend_table(text):
            # an answer begins at the id after the whole prompt, at most `longest`, and may have that many tokens itself
            text.max_position_embeddings = 2 * longest
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        finally:
            if longest:
                text.max_position_embeddings = longest
            if sections is not None:
                rope["mrope_section"] = sections
        self.reader = EncoderReader(self.family, self, self.settings.methods)
        self.offsets: tuple[Tensor, Tensor] | None = None  # of the next forward: which columns move, and how far
        self.decisions = Decisions()

    @property
    def moves(self) -> bool:
        """Whether kept tokens keep their original positions."""
        return self.settings.positions == "original"

    @property
    def digits(self) -> int:
        """The columns that an offset takes behind an embedding: two per axis."""
        return (4 if self.family.mrope else 2) if self.moves else 0

    # -- reduction ----------------------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images and reduce them; videos stay whole."""
        plans = kwargs.pop(PLAN, None)
        spans, words = kwargs.pop(SPAN, None), kwargs.pop(WORDS, None)
        if plans is None:  # videos
            embeddings = super().embed_multimodal(**kwargs)  # type: ignore[misc]
            return None if embeddings is None else [_with_columns(rows, self.digits) for rows in embeddings]
        images = [ImagePlan.read(numbers.tolist()) for numbers in plans]
        layouts = self.family.layouts(self.config, [plan.size for plan in images], kwargs)
        methods = [self.settings.methods[plan.method].with_budget(plan.budget) for plan in images if plan.reduces]
        keys = self._keys(kwargs, images, layouts, words)
        parts = [self.family.parts(layout) for layout in layouts]
        in_parts = [part for of_image in parts for part in of_image]
        self.reader.begin(methods, in_parts)
        try:
            embeddings = list(super().embed_multimodal(**kwargs))  # type: ignore[misc]
        finally:
            by_layer, patches = self.reader.end(in_parts)
        device = embeddings[0].device
        layouts = [replace(layout.to(device), separators="none") for layout in layouts]
        notes = (RECEIVED_FOR_CLS,) * self.reader.replaces_cls(methods)
        hashes = self.reader.pixel_hashes(methods, kwargs, in_parts)
        in_parts = [replace(part.to(device), separators="none") for part in in_parts]
        outputs = EncoderOutputs(in_parts, by_layer, patches, [], hashes, self.reader.depth, notes, None)
        starts = [0, *accumulate(map(len, parts))]
        members = [range(start, end) for start, end in pairwise(starts)]  # of each image, the numbers of its parts
        decisions = self._decide(images, layouts, members, embeddings, outputs, words, keys=keys)
        reduced_rows = []
        for number, (plan, decision) in enumerate(zip(images, decisions, strict=True)):
            entered = torch.cat([patches[part] for part in members[number]]) if patches else None
            rows = self._rows(decision, embeddings[number], layouts[number], entered)
            anchors = decision.anchors
            if spans is not None:
                rows, anchors = self._insert_text(rows, anchors, spans[number].to(device))
            if len(rows) != plan.rows:
                raise RuntimeError(f"an image has {len(rows)} rows; {plan.rows} placeholders were promised: {plan}")
            reduced_rows.append(self._with_offsets(rows, anchors, layouts[number]))
        return reduced_rows

    def _keys(
        self, kwargs: Mapping[str, Any], images: Sequence[ImagePlan], layouts: Sequence[TokenLayout], words: Any
    ) -> list[tuple[Any, ...]]:
        """Return what the decision about each image depends on."""
        hashes = torch.stack([pixel_hash(pixels) for pixels in self.family.pixels(kwargs, layouts)]).tolist()
        texts = [()] * len(images) if words is None else [tuple(ids.tolist()) for ids in words]
        return list(zip(hashes, images, texts, strict=True))

    def _decide(
        self,
        images: Sequence[ImagePlan],
        layouts: Sequence[TokenLayout],
        members: Sequence[range],
        embeddings: Sequence[Tensor],
        outputs: EncoderOutputs,
        words: Any,
        *,
        keys: Sequence[tuple[Any, ...]],
    ) -> list[Reduction]:
        """Return the decision about each image; a remembered one if it was decided about before.

        The prefix cache may hold the first part of an image whose rows have left the encoder cache. If it is encoded
        again, in a batch of another shape, scores may differ in their last bits; the decision must not.
        """
        device = embeddings[0].device
        decisions = [self.decisions.get(key) for key in keys]
        waiting: dict[tuple[int, int], list[int]] = {}
        for number, plan in enumerate(images):
            if not plan.reduces:
                decisions[number] = Reduction.identity(layouts[number].total, device=device)
            elif decisions[number] is None:
                waiting.setdefault((plan.method, plan.budget), []).append(number)
        width = self.config.get_text_config().hidden_size  # behind it, Qwen3-VL has the planes of deepstack
        for (method, budget), numbers in waiting.items():
            parts = [part for number in numbers for part in members[number]]
            in_parts = [outputs.layouts[part] for part in parts]
            rows = torch.cat([embeddings[number][:, :width] for number in numbers])
            split = torch.split(rows, [layout.total for layout in in_parts])
            features = [_patch_rows(of_part, layout) for of_part, layout in zip(split, in_parts, strict=True)]
            patches = [outputs.patches[part] for part in parts] if outputs.patches else []
            text = None if words is None else self._user_text([words[number] for number in numbers], device)
            row_of = [row for row, number in enumerate(numbers) for _ in members[number]]
            project = partial(self.family.project, self)
            evidence = ConnectorEvidence(in_parts, features, patches, outputs, parts, text, row_of, project)
            chosen = self.settings.methods[method].with_budget(budget)
            decided = iter(decide(chosen, "image", evidence, [[layout.patches] for layout in in_parts]))
            for number in numbers:
                of_parts = [next(decided) for _ in members[number]]
                decision = of_parts[0] if len(of_parts) == 1 else layouts[number].merge_parts(of_parts)
                decisions[number] = decision
                self.decisions.put(keys[number], decision)
        return [decision for decision in decisions if decision is not None]

    def _user_text(self, words: Sequence[Tensor], device: torch.device) -> UserText:
        """Embed the words of each image's prompt."""
        lengths = torch.tensor([len(ids) for ids in words], device=device)
        ids = pad_sequence([ids.to(device) for ids in words], batch_first=True)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        return UserText(self._embed(ids.flatten()).view(*ids.shape, -1), mask)

    def _embed(self, ids: Tensor) -> Tensor:
        """Return the LLM's embeddings of text tokens."""
        embedded: Tensor = self.get_language_model().embed_input_ids(ids)
        return embedded

    def _rows(self, decision: Reduction, embeddings: Tensor, layout: TokenLayout, patches: Any) -> Tensor:
        """Apply a decision to the rows of one image, before or after the projector."""
        if decision.projected:
            return decision.apply(embeddings)
        entered = layout.insert_separators(patches)
        projected = self.family.project(self, decision.apply(entered)).to(embeddings.dtype)
        levels = embeddings[:, projected.shape[1] :]  # of deepstack; they come from projectors of their own
        return torch.cat([projected, decision.apply(levels)], -1) if levels.shape[1] else projected

    def _insert_text(self, rows: Tensor, anchors: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
        """Put the text tokens between an image's tokens back among its kept rows; anchors then count in the span."""
        visual = span == self.family.image_token(self.config)
        places = visual.nonzero().squeeze(-1)[anchors]
        text = (~visual).nonzero().squeeze(-1)
        embedded = self._embed(span[text])
        if rows.shape[1] > embedded.shape[1]:
            embedded = _with_columns(embedded, rows.shape[1] - embedded.shape[1])
        places, order = torch.cat([places, text]).sort()
        return torch.cat([rows, embedded.to(rows)])[order], places

    def _with_offsets(self, rows: Tensor, anchors: Tensor, layout: TokenLayout) -> Tensor:
        """Append how far each row stands from the image's first token, in two digits per axis."""
        if not self.moves:
            return rows
        axes = [anchors // layout.views[0][1], anchors % layout.views[0][1]] if self.family.mrope else [anchors]
        digits = [digit for axis in axes for digit in (axis // DIGIT, axis % DIGIT)]
        return torch.cat([rows, torch.stack(digits, -1).to(rows)], -1)

    # -- positions ----------------------------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """Return position ids `[3, L]`, and how far the answer's ids are ahead of their columns.

        With original positions there is room for all tokens. All kept tokens of an image get the id of its first here;
        their offsets are added when they are prefilled.
        """
        if not self.moves:
            reduced = any(_plan(feature).reduces for feature in mm_features if feature.modality == "image")
            if reduced:
                return torch.arange(len(input_tokens)).expand(3, -1).contiguous(), 0
            ids: tuple[Tensor, int] = super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
            return ids
        whole: list[int] = []  # the prompt before the reduction
        columns: list[int] = []  # the column in it that each token takes its id from
        features, column = [], 0
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            place = feature.mm_position
            if feature.modality != "image":
                shifted = replace(place, offset=place.offset + len(whole) - column)
                features.append(replace(feature, mm_position=shifted))
                continue
            plan = _plan(feature)
            before = 0 if place.is_embed is None else int(place.is_embed.int().argmax())
            start = place.offset + before
            columns += range(len(whole), len(whole) + start - column)
            whole += input_tokens[column:start]
            length = place.length + plan.span - plan.rows
            shifted = replace(place, offset=len(whole) - before, length=length, is_embed=None)
            features.append(replace(feature, mm_position=shifted))
            columns += [len(whole)] * plan.rows
            whole += [input_tokens[start]] * plan.span
            column = start + plan.rows
        columns += range(len(whole), len(whole) + len(input_tokens) - column)
        whole += input_tokens[column:]
        if self.family.mrope:
            positions, ahead = super().get_mrope_input_positions(whole, features)  # type: ignore[misc]
        else:
            positions, ahead = torch.arange(len(whole)).expand(3, -1), 0
        return positions[:, columns].contiguous(), ahead + len(whole) - len(input_tokens)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None, **kwargs: Any
    ) -> Tensor:
        """Take the offsets off the embeddings; the forward that follows adds them to the positions of these columns."""
        self.offsets = None
        if self.digits and multimodal_embeddings is not None and len(multimodal_embeddings):
            digits = torch.cat([rows[:, -self.digits :] for rows in multimodal_embeddings]).round().long()
            high, low = digits[:, ::2], digits[:, 1::2]
            self.offsets = is_multimodal, (high * DIGIT + low).T
            multimodal_embeddings = [rows[:, : -self.digits] for rows in multimodal_embeddings]
        embedded: Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal, **kwargs
        )
        return embedded

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.offsets is not None:
            (columns, offsets), self.offsets = self.offsets, None
            columns = columns.nonzero().squeeze(-1).to(positions.device)
            # in place: captured graphs read the positions from this buffer
            if self.family.mrope:
                positions[1:, columns] += offsets.to(positions)
            else:
                positions[:, columns] += offsets.to(positions)
        if not self.family.mrope and positions.ndim == 2:
            positions = positions[0]
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]


def check_engine(vllm_config: Any, settings: EngineSettings) -> None:
    """Refuse an engine that would run past the reduction, or reduce twice.

    Raises:
        Refusal: naming the option of vLLM's.
    """
    multimodal, compilation = vllm_config.model_config.multimodal_config, vllm_config.compilation_config
    parallel = vllm_config.parallel_config
    if multimodal.is_multimodal_pruning_enabled():
        raise Refusal("vLLM's own video pruning is on: it and Tokensieve both append columns; use one of them")
    if compilation.cudagraph_mm_encoder:
        raise Refusal("a captured vision encoder runs past the reduction: set cudagraph_mm_encoder=False")
    reads = any(method.needs.reads_attention or method.needs.requests("patches") for method in settings.methods)
    if reads and compilation.compile_mm_encoder:
        raise Refusal("a method cannot read in a compiled vision encoder: set compile_mm_encoder=False")
    if reads and multimodal.mm_encoder_tp_mode == "data":
        raise Refusal(
            "a method cannot read in a vision encoder that each rank runs for other images: use "
            "mm_encoder_tp_mode='weights'"
        )
    if settings.positions != "original":
        return
    if parallel.pipeline_parallel_size > 1:
        raise Refusal("original positions reach the first pipeline stage only: start with positions='contiguous'")
    if vllm_config.speculative_config is not None:
        raise Refusal("a drafter does not receive original positions: start with positions='contiguous'")


def _plan(feature: Any) -> ImagePlan:
    """Return the plan of one image of a prompt."""
    return ImagePlan.read(feature.data[PLAN].data.tolist())


def _with_columns(rows: Tensor, columns: int) -> Tensor:
    """Append columns of zeros."""
    return torch.cat([rows, rows.new_zeros(len(rows), columns)], -1) if columns else rows


def _patch_rows(rows: Tensor, layout: TokenLayout) -> Tensor:
    """Return the rows of the patches, without separators."""
    return rows if layout.patch_index is None else rows[layout.patch_index]


def _define(family: ServedFamily) -> type:
    """Define the reduced class of a family."""
    private.check(family.architecture)  # before anything of vLLM's is overridden
    module = importlib.import_module(f"vllm.model_executor.models.{family.module}")
    base = getattr(module, family.architecture)
    fields: dict[str, Any] = {"family": family, "__module__": __name__}
    mapper = family.weights_mapper()
    if mapper is not None:
        fields["hf_to_vllm_mapper"] = base.hf_to_vllm_mapper | mapper
    reduced = type(family.reduced_architecture, (Reduced, base), fields)
    factories = base._processor_factory
    register = MULTIMODAL_REGISTRY.register_processor(
        reduced_processor(factories.processor, family), info=factories.info, dummy_inputs=factories.dummy_inputs
    )
    registered: type = register(reduced)
    return registered


def __getattr__(name: str) -> Any:
    """Define a reduced class when vLLM first asks for it: each imports the module of its family."""
    for family in FAMILIES:
        if family.reduced_architecture == name:
            globals()[name] = _define(family)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
