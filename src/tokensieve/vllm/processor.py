"""The frontend half: promise the number of placeholders of each image, before its encoder runs.

A processor of vLLM's is wrapped. It promises the kept rows of an image instead of all, tells the worker so in the
image's own data, and makes method, budget, positions and the user's words a part of the image's hash. This hash keys
vLLM's processor cache, encoder cache and prefix cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.processing import PromptUpdateDetails

from tokensieve import tally
from tokensieve.engine.prompt.user_text import UserTextFinder
from tokensieve.errors import Refusal
from tokensieve.methods import Needs
from tokensieve.vllm.families import ServedFamily
from tokensieve.vllm.plan import PLAN, SPAN, WORDS, ImagePlan
from tokensieve.vllm.settings import Choice, EngineSettings

PREFIX = "tokensieve_"


@dataclass(frozen=True)
class Request:
    """The request that this thread processes: its choice, and the ids of the user's words if its method reads them."""

    choice: Choice
    words: tuple[int, ...] | None


_request: ContextVar[Request] = ContextVar("tokensieve_request")


@dataclass
class ReducedDetails(PromptUpdateDetails):
    """The placeholders of a reduced image, with the counts that its cached copy must remember."""

    method: str = ""
    before: int = 0
    after: int = 0
    dropped: int = 0


class ReducedProcessor:
    """Mixed in before a processor class of vLLM's."""

    family: ClassVar[ServedFamily]
    info: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = self.info.get_hf_config()
        self.settings = EngineSettings.of_config(self.config)
        self.profiling = False
        self._text_finder: UserTextFinder | None = None

    # -- one request --------------------------------------------------------------------------------------------------

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Mark vLLM's inputs for profiling: they are not tallied."""
        self.profiling = True
        try:
            return super().get_dummy_mm_inputs(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.profiling = False

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Take our options out of the request, so that transformers' processor does not see them."""
        options, rest = {}, {}
        for name, value in inputs.hf_processor_mm_kwargs.items():
            (options if name.startswith(PREFIX) else rest)[name] = value
        choice = self.settings.choose(options)
        needs, words = choice.method.needs, None
        if isinstance(needs, Needs) and needs.user_text and inputs.mm_data_items.get_all_counts().get("image"):
            words = self._words(inputs.prompt)
        token = _request.set(Request(choice, words))
        try:
            return super().apply(replace(inputs, hf_processor_mm_kwargs=rest), timing_ctx)  # type: ignore[misc]
        finally:
            _request.reset(token)

    def _words(self, prompt: Any) -> tuple[int, ...]:
        """Return the ids of the user's words, as an attached method finds them."""
        tokenizer = self.info.get_tokenizer()
        ids = list(prompt) if not isinstance(prompt, str) else tokenizer.encode(prompt)
        image, stands_for_image = self.family.image_token(self.config), self.family.prompt_token(self.config, tokenizer)
        ids = [image if token == stands_for_image else token for token in ids]
        if self._text_finder is None:
            model: Any = SimpleNamespace(config=self.config, generation_config=None)
            self._text_finder = UserTextFinder(model, self.info.get_hf_processor())
        words = tuple(ids[column] for column in self._text_finder.columns(ids, before_image=True))
        if not words and not self.profiling:
            raise Refusal("the prompt has no words to go by; this method needs the user's text")
        return words or (ids[0],)  # vLLM profiles with a prompt of images only

    def _get_mm_hashes(self, inputs: Any) -> Any:
        request, settings = _request.get(), self.settings
        words = "" if request.words is None else "-" + ".".join(map(str, request.words))
        mark = f"-{request.choice.method}-{settings.positions}-{settings.from_tokens}{words}".replace(" ", "")
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        return {kind: [h + mark if kind == "image" else h for h in of_kind] for kind, of_kind in hashes.items()}

    # -- one image ----------------------------------------------------------------------------------------------------

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        return [self._shortened(u, out_mm_kwargs.get("image")) if u.modality == "image" else u for u in updates]

    def _shortened(self, update: Any, images: Any) -> Any:
        """Wrap the update of the images' placeholders; vLLM asks it for one image at a time."""

        def shorter(number: int) -> PromptUpdateDetails:
            whole = update.content
            whole = whole(number) if callable(whole) else whole
            return self._promise(whole, images[number])

        return replace(update, replacement=shorter)

    def _promise(self, whole: Any, item: Any) -> PromptUpdateDetails:
        """Return the placeholders of one image, and put its plan into its data."""
        request, image = _request.get(), self.family.image_token(self.config)
        tokens: list[int] = whole.full if isinstance(whole, PromptUpdateDetails) else whole
        fields: Mapping[str, Any] = item.get_data()
        if "image_embeds" in fields:
            raise Refusal("ready image embeddings cannot be reduced: send the image")
        first, end = tokens.index(image), len(tokens) - tokens[::-1].index(image)
        span = tokens[first:end]  # other tokens within it, such as the breaks of rows, become rows of the image
        size = self.family.size(self.config, fields)
        layout = self.family.layout(self.config, size)
        if span.count(image) != layout.total:
            raise RuntimeError(
                f"an image of size {size} has {span.count(image)} placeholders and {layout.total} tokens"
            )
        plan = ImagePlan.of(request.choice, layout, len(span), size, self.settings.from_tokens)
        item[PLAN] = _field(torch.tensor(plan.numbers()), keep_on_cpu=True)
        if len(span) > layout.total:
            item[SPAN] = _field(torch.tensor(span))
        if request.words is not None:
            item[WORDS] = _field(torch.tensor(request.words))
        short = [*tokens[:first], *[image] * plan.rows, *tokens[end:]]
        embedded = torch.zeros(len(short), dtype=torch.bool)
        embedded[first : first + plan.rows] = True
        return ReducedDetails(
            short,
            None if bool(embedded.all()) else lambda full: embedded,
            method=request.choice.method.info.name,
            before=layout.total,
            after=plan.rows - (len(span) - layout.total),
            dropped=len(span) - plan.rows,
        )

    def _apply_prompt_updates(self, token_ids: Any, mm_prompt_updates: Any) -> Any:
        result = super()._apply_prompt_updates(token_ids, mm_prompt_updates)  # type: ignore[misc]
        contents = [update.content for updates in mm_prompt_updates.get("image", ()) for update in updates[:1]]
        images = [content for content in contents if isinstance(content, ReducedDetails)]
        self._check_positions(len(result[0]), sum(image.dropped for image in images))
        if not self.profiling:
            for image in images:
                tally.add(image.method, image.before, image.after)
        return result

    def _check_positions(self, kept: int, dropped: int) -> None:
        """Refuse a prompt whose original position ids are beyond the LLM's rotary table: it would read past its end."""
        if self.settings.positions != "original" or self.family.mrope or not dropped:
            return
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and kept + dropped > longest:
            raise Refusal(
                f"the prompt has position ids up to {kept + dropped} before the reduction, and the model has {longest}; "
                "start the engine with positions='contiguous', or send fewer or smaller images"
            )


def _field(data: torch.Tensor, keep_on_cpu: bool = False) -> MultiModalFieldElem:
    return MultiModalFieldElem(data=data, field=MultiModalBatchedField(keep_on_cpu=keep_on_cpu))


def reduced_processor(factory: Any, family: ServedFamily) -> Any:
    """Wrap the factory of a model's processor."""
    classes: dict[type, type] = {}

    def build(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
        kind = type(factory(info, dummy_inputs, **kwargs))  # a factory may choose the class by the config
        if kind not in classes:
            classes[kind] = type(f"Reduced{kind.__name__}", (ReducedProcessor, kind), {"family": family})
        return classes[kind](info, dummy_inputs, **kwargs)

    return build
