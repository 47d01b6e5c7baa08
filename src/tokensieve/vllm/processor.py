"""The frontend half: promise the number of placeholders of each image, before its encoder runs.

A processor of vLLM's is wrapped. It promises the kept rows of an image instead of all, tells the worker so in the
image's own data, and makes method, budget, positions and the user's words a part of the image's hash. This hash keys
vLLM's processor cache, encoder cache and prefix cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.processing import ProcessorInputs, PromptUpdateDetails

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
    """The request that this thread processes.

    Attributes:
        words: the ids of the user's words, if the method reads them.
        profiling: vLLM measures its memory: images stay whole, because a request may keep all tokens.
        options: names of the options in the request that are transformers'.
    """

    choice: Choice
    words: tuple[int, ...] | None
    profiling: bool
    options: tuple[str, ...]


_request: ContextVar[Request] = ContextVar("tokensieve_request")


@dataclass
class MarkedInputs(ProcessorInputs):  # type: ignore[misc]
    """Inputs whose image hashes hold the request's choice."""

    mark: str = ""
    hashes: dict[str, list[str]] = field(default_factory=dict)

    def get_mm_hashes(self, *args: Any, **kwargs: Any) -> Any:
        hashes = super().get_mm_hashes(*args, **kwargs)
        self.hashes = {kind: [h + self.mark * (kind == "image") for h in of_kind] for kind, of_kind in hashes.items()}
        return self.hashes


@dataclass
class ReducedDetails(PromptUpdateDetails):  # type: ignore[misc]  # vLLM is not there when types are checked
    """The placeholders of a reduced image, with the counts that its cached copy must remember."""

    method: str = ""
    before: int = 0
    after: int = 0
    dropped: int = 0


class ReducedProcessor:
    """Mixed in before a processor class of vLLM's."""

    family: ClassVar[ServedFamily]
    info: Any
    dummy_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = self.info.get_hf_config()
        self.settings = EngineSettings.of_config(self.config)
        self._text_finder: UserTextFinder | None = None
        self._profiling_inputs: Any = None
        if not hasattr(super(), "get_dummy_inputs"):  # vLLM 0.30 asks the builder
            make_inputs = self.dummy_inputs.get_dummy_processor_inputs
            self.dummy_inputs.get_dummy_processor_inputs = lambda *a, **k: self._note(make_inputs(*a, **k))

    # -- one request --------------------------------------------------------------------------------------------------

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        return self._note(super().get_dummy_inputs(*args, **kwargs))  # type: ignore[misc]

    def _note(self, inputs: Any) -> Any:
        """Remember the inputs that vLLM measures its memory with."""
        self._profiling_inputs = inputs
        return inputs

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Take our options out of the request, so that transformers' processor does not see them."""
        options: dict[str, Any] = {}
        for_transformers: dict[str, Any] = {}
        for name, value in inputs.hf_processor_mm_kwargs.items():
            (options if name.startswith(PREFIX) else for_transformers)[name] = value
        choice = self.settings.choose(options)
        needs, words, profiling = choice.method.needs, None, inputs is self._profiling_inputs
        shows_image = inputs.mm_data_items.get_all_counts().get("image")
        if isinstance(needs, Needs) and needs.user_text and shows_image and not profiling:
            words = self._words(inputs.prompt, inputs.mm_data_items, for_transformers)
        request = Request(choice, words, profiling, tuple(for_transformers))
        values = {field.name: getattr(inputs, field.name) for field in fields(ProcessorInputs)}
        marked = MarkedInputs(**values | {"hf_processor_mm_kwargs": for_transformers}, mark=self._mark(request))
        token = _request.set(request)
        try:
            return super().apply(marked, timing_ctx)  # type: ignore[misc]
        except Refusal:
            # the cache counts these images as sent to the engine, which never receives them; so it forgets them
            cache = self.cache if hasattr(self, "cache") else inputs.cache  # vLLM 0.30 keeps it in the processor
            for image in (h for of_kind in marked.hashes.values() for h in of_kind if cache is not None):
                cache.invalidate(image)
            raise
        finally:
            _request.reset(token)

    def _words(self, prompt: Any, mm_items: Any, hf_processor_mm_kwargs: Any) -> tuple[int, ...]:
        """Return the ids of the user's words, as an attached method finds them."""
        tokenizer = self.info.get_tokenizer()
        ids = list(prompt) if not isinstance(prompt, str) else tokenizer.encode(prompt)
        image, stands_for_image = self.family.image_token(self.config), self.family.prompt_token(self.config, tokenizer)
        ids = [image if token == stands_for_image else token for token in ids]
        if self.family.writes_text:  # an attached method receives the expanded prompt, and may find words in this text
            (update,) = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, {})  # type: ignore[misc]
            images = (_tokens(update, number) for number in range(mm_items.get_all_counts()["image"]))
            ids = [i for token in ids for i in (next(images, [token]) if token == image else [token])]
        if self._text_finder is None:
            model: Any = SimpleNamespace(config=self.config, generation_config=None)
            self._text_finder = UserTextFinder(model, self.info.get_hf_processor())
        words = tuple(ids[column] for column in self._text_finder.columns(ids, before_image=True))
        if not words:
            raise Refusal("the prompt has no words to go by; this method needs the user's text")
        return words

    def _mark(self, request: Request) -> str:
        """Return what an image's rows depend on besides its pixels."""
        # a digest: caches hold this mark with each image, and their bounds do not count it
        words = "" if request.words is None else "-" + sha256(str(request.words).encode()).hexdigest()
        whole = "-whole" * request.profiling
        mark = f"-{request.choice.method}-{self.settings.positions}-{self.settings.from_tokens}{whole}{words}"
        return mark.replace(" ", "")

    # -- one image ----------------------------------------------------------------------------------------------------

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        return [self._shortened(u, out_mm_kwargs.get("image")) if u.modality == "image" else u for u in updates]

    def _shortened(self, update: Any, images: Any) -> Any:
        """Wrap the update of the images' placeholders; vLLM asks it for one image at a time."""

        def shorter(number: int) -> PromptUpdateDetails:
            return self._promise(_tokens(update, number), images[number])

        return replace(update, replacement=shorter)

    def _promise(self, tokens: list[int], item: Any) -> PromptUpdateDetails:
        """Return the placeholders of one image, and put its plan into its data.

        Args:
            tokens: what stands for the whole image in the prompt.
        """
        request, image = _request.get(), self.family.image_token(self.config)
        fields: Mapping[str, Any] = item.get_data()
        if "image_embeds" in fields:
            raise Refusal("ready image embeddings cannot be reduced: send the image")
        first, end = tokens.index(image), len(tokens) - tokens[::-1].index(image)
        span = tokens[first:end]  # other tokens within it, such as the breaks of rows, become rows of the image
        size = self.family.size(self.config, fields)
        layout = self.family.layout(self.config, size)
        if span.count(image) != layout.total:
            differs = f"an image of size {size} has {span.count(image)} placeholders and {layout.total} tokens"
            if request.options:  # such as the size: vLLM counts placeholders without some of them
                raise Refusal(f"{differs} with these options of the processor: {', '.join(request.options)}")
            raise RuntimeError(differs)
        from_tokens = layout.total + 1 if request.profiling else self.settings.from_tokens
        plan = ImagePlan.of(request.choice, self.family.parts(layout), len(span), size, from_tokens)
        needs = request.choice.method.needs
        if plan.reduces and not layout.mapped and (needs.reads_attention or needs.requests("patches")):
            raise Refusal(
                f"{self.family.title} resamples an image of this size after its encoder: rows of the encoder belong to "
                "none of its visual tokens; use a method that reads nothing in the encoder, or smaller images"
            )
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
        if not _request.get().profiling:
            for image in images:
                tally.add(image.method, image.before, image.after)
        return result

    def _check_positions(self, kept: int, dropped: int) -> None:
        """Refuse a prompt whose original position ids, or those of its answer, would be read past the rotary table."""
        if self.settings.positions != "original" or self.family.mrope or not dropped:
            return
        text = self.config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None)
        if longest is None:
            return
        # an answer ends at max_model_len kept tokens, so its last id is below max_model_len + dropped
        needed = kept + dropped if can_extend_table(text) else self.info.ctx.model_config.max_model_len + dropped
        if needed > longest:
            raise Refusal(
                f"the prompt drops {dropped} tokens and needs {needed} position ids, and the model has {longest}; "
                "start the engine with positions='contiguous' or a smaller max_model_len, or send smaller images"
            )


def _tokens(update: Any, number: int) -> list[int]:
    """Return the tokens that vLLM puts into the prompt for one image."""
    whole = update.content
    whole = whole(number) if callable(whole) else whole
    return list(whole.full if isinstance(whole, PromptUpdateDetails) else whole)


def can_extend_table(text_config: Any) -> bool:
    """Return whether the LLM's rotary table can be longer without other values in it."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    return rope.get("rope_type", "default") in ("default", "linear", "llama3")


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
