"""The embedded engine: transformers' own server on a model that Tokensieve loaded, with the method attached.

Requests generate one after the other, on one thread: transformers' continuous batching takes token ids only, so a model
with images falls back to plain ``generate`` there, too. One thread also makes the swap of methods between two requests
safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, NoReturn

import fastapi
import uvicorn
from fastapi.responses import JSONResponse, Response
from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from transformers import StoppingCriteria
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality, _GenerationCancelled

from tokensieve import tally
from tokensieve.budget import Budget, BudgetScope
from tokensieve.engine import Sieve, attach
from tokensieve.errors import Refusal, first_line
from tokensieve.images import decode_image
from tokensieve.loading import devices_of, to_model
from tokensieve.measure.latency import synchroniser
from tokensieve.methods import Method, Positions, Repair, parse
from tokensieve.models.layout import Separators
from tokensieve.serve.body import image_bytes, texts_of
from tokensieve.serve.guard import Guard
from tokensieve.serve.metrics import Prefill
from tokensieve.serve.settings import Settings
from tokensieve.vllm.settings import KEEP, METHOD, with_keep

FAILED = "the server failed; its log has the reason"

log = logging.getLogger(__name__)
_choice: ContextVar[Mapping[str, Any]] = ContextVar("choice")  # of the request that is being handled
_stops: ContextVar[list[str]] = ContextVar("stops")  # its stop strings


class Attached:
    """The model, and the method that is attached to it at the moment.

    Args:
        model, processor: as loaded.
        method: spec of requests that choose none.
        keep: budget of requests that choose none; ``None`` leaves it to the spec.
        positions, budget_scope, separators, repair: as in :func:`tokensieve.attach`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        method: str,
        keep: Budget | None = None,
        positions: Positions = "original",
        budget_scope: BudgetScope = "image",
        separators: Separators = "kept-lines",
        repair: Repair | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.prefill = Prefill()
        self._method, self._keep = method, keep
        options = {"positions": positions, "budget_scope": budget_scope, "separators": separators, "repair": repair}
        self._options: dict[str, Any] = {**options, "processor": processor}
        self._sieve: Sieve | None = None
        self._spec = ""
        self._wait = synchroniser(devices_of(model))

    def methods(self, choice: Mapping[str, Any]) -> list[Method]:
        """Return the methods of a request.

        Raises:
            Refusal: the budget does not fit the method.
        """
        spec = choice.get(METHOD) or self._method
        if choice.get(KEEP) is not None:
            return with_keep(parse(spec), choice[KEEP])
        default = self._keep if spec == self._method and spec != "full" else None
        return parse(spec) if default is None else parse(spec, keep=default)

    def attach(self, choice: Mapping[str, Any]) -> None:
        """Attach the method of a request."""
        self._attach(self.methods(choice))

    def __str__(self) -> str:
        return self._spec

    def generate(self, methods: list[Method], watch: Watch, **arguments: Any) -> Any:
        """Generate with these methods attached; count the images when the first token is there."""
        self._attach(methods)
        tokens: list[int] = []
        seconds: list[float] = []

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if not tokens:  # the first forward of the LLM is the prefill
                rows = kwargs.get("inputs_embeds")
                tokens.append((kwargs["input_ids"] if rows is None else rows).shape[1])
                self._wait()
                seconds.append(-time.perf_counter())

        def after(module: Any, args: Any, output: Any) -> None:
            if len(seconds) == 1:
                self._wait()
                seconds.append(time.perf_counter())

        def count() -> None:
            self.prefill.add(tokens[0], sum(seconds))
            name = " + ".join(method.info.name for method in methods)
            for images in self._sieve.last if self._sieve is not None else []:  # empty without images
                for reduction in images:
                    tally.add(name, reduction.total, reduction.slots)

        watch.on_first_token = count
        llm = self.model.get_decoder()
        handles = [llm.register_forward_pre_hook(before, with_kwargs=True), llm.register_forward_hook(after)]
        try:
            return self.model.generate(**arguments, stopping_criteria=[watch])
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, methods: list[Method]) -> None:
        spec = " + ".join(map(str, methods))
        if spec == self._spec:
            return
        if self._sieve is not None:
            self._sieve.detach()
        self._spec = ""  # nothing is attached if the next line refuses
        self._sieve = attach(self.model, methods, **self._options)
        self._spec = spec


class Watch(StoppingCriteria):  # type: ignore[misc]
    """Stops a generation at a stop string, or when its client is gone; calls a function at the first token.

    transformers' own search for stop strings does not work with every tokenizer, for example one of whole words.

    Args:
        decode: turns ids into text.
        stops: the stop strings.
    """

    def __init__(self, decode: Callable[[Any], str], stops: Sequence[str]) -> None:
        self.cancelled = threading.Event()
        self.on_first_token: Callable[[], None] | None = None
        self._decode, self._stops, self._prompt = decode, stops, 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return `[1]` bool: whether the generation ends."""
        if self.on_first_token is not None:
            self.on_first_token()
            self.on_first_token, self._prompt = None, input_ids.shape[1] - 1
        # a character of a stop string is at most four tokens of bytes, plus some in front for joined words
        tail = 4 * max(map(len, self._stops), default=0) + 8
        text = self._decode(input_ids[0, max(self._prompt, input_ids.shape[1] - tail) :]) if self._stops else ""
        stop = self.cancelled.is_set() or any(string in text for string in self._stops)
        return input_ids.new_full((len(input_ids),), stop).bool()


class _Call:
    """Takes the place of the model in one call of transformers' manager, on its thread."""

    def __init__(self, attached: Attached, methods: list[Method]) -> None:
        self._attached, self._methods = attached, methods
        self.watch = Watch(attached.processor.decode, _stops.get())

    def generate(self, **arguments: Any) -> Any:
        if self.watch.cancelled.is_set():  # its client left while it waited
            raise Refusal("the request was cancelled")
        try:
            return self._attached.generate(self._methods, self.watch, **arguments)
        except Exception as error:
            if "streamer" not in arguments or isinstance(error, _GenerationCancelled):
                raise
            # a stream has begun: transformers writes the text of the error between the quotes of a JSON string
            if isinstance(error, Refusal):
                raise Refusal(json.dumps(first_line(error))[1:-1]) from error
            log.exception("a stream failed")
            raise RuntimeError(FAILED) from error


class _Manager(GenerateManager):  # type: ignore[misc]
    """Generates with the method that the request chose, and stops when its client is gone."""

    def __init__(self, attached: Attached) -> None:
        super().__init__()
        self._attached = attached

    def generate_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return super().generate_streaming(self._call(), *args, **kwargs)

    async def generate_non_streaming(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._call()
        generation = asyncio.ensure_future(super().generate_non_streaming(call, *args, **kwargs))
        try:
            # without the shield, the thread would set the result of a future that is cancelled
            return await asyncio.shield(generation)
        except asyncio.CancelledError:
            call.watch.cancelled.set()
            generation.add_done_callback(lambda done: done.exception())  # nobody awaits it any more
            raise

    def _call(self) -> _Call:
        return _Call(self._attached, self._attached.methods(_choice.get()))


class _State(GenerationState):  # type: ignore[misc]
    """Gives every request the one manager."""

    def __init__(self, attached: Attached) -> None:
        super().__init__()
        self._manager = _Manager(attached)

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return self._manager


class _Models(ModelManager):  # type: ignore[misc]
    """Holds the one model that is loaded already."""

    def __init__(self, name: str, attached: Attached) -> None:
        self.force_model, self._attached, self._created = name, attached, int(time.time())

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self._attached.model, self._attached.processor

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        entry = {"id": self.force_model, "object": "model", "created": self._created, "owned_by": "tokensieve"}
        return [entry]

    def shutdown(self) -> None:
        gc.collect()


class _Chat(ChatCompletionHandler):  # type: ignore[misc]
    """Builds the inputs as the other commands do: images decoded by Tokensieve, the prompt checked before it runs."""

    def __init__(self, attached: Attached, models: _Models, state: _State) -> None:
        super().__init__(models, state)
        self._attached = attached
        # one thread: tokenizers are not safe in several, and the event loop stays free
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="preparing")

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        choice = body.pop("mm_processor_kwargs", None) or {}
        if body.get("max_completion_tokens") is not None:  # releases before 5.23 do not read it
            body["max_tokens"] = body.pop("max_completion_tokens")
        stop = body.pop("stop", None) or []
        self._validate_request(body)
        _check_fields(body)
        if not body.get("logit_bias"):  # transformers refuses an empty one
            body.pop("logit_bias", None)
        self._attached.methods(choice)  # refused before the images are decoded
        _choice.set(choice)
        _stops.set([stop] if isinstance(stop, str) else stop)
        name, model, processor = self._resolve_model(body)
        loop = asyncio.get_running_loop()
        inputs = await loop.run_in_executor(self._preparing, self._inputs, body)
        if body.get("logit_bias"):
            vocabulary = model.config.get_text_config().vocab_size
            body["logit_bias"] = _read_bias(body["logit_bias"], vocabulary)
        config = self._build_generation_config(body, model.generation_config)
        _fit(config, body, inputs["input_ids"].shape[1], model.config.get_text_config())
        answer = self._streaming if body.get("stream") else self._non_streaming
        # releases before 5.23 do not take the tools a second time
        tools = {"tools": body.get("tools")} if "tools" in inspect.signature(answer).parameters else {}
        manager = self.generation_state.get_manager(name)
        outcome = answer(request_id, model, processor, name, inputs, config, gen_manager=manager, **tools)
        return await outcome if inspect.isawaitable(outcome) else outcome

    def _inputs(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the tensors of a prompt, on the model's device.

        Raises:
            Refusal: an image that cannot be decoded, or a text with a placeholder of images.
        """
        processor = self._attached.processor
        for kind in ("image", "video"):
            placeholder = getattr(processor, f"{kind}_token", None)
            if placeholder and any(placeholder in text for text in texts_of(body)):
                raise Refusal(f"leave {placeholder} out of the text, the {kind} is put there by itself")
        messages = self.get_processor_inputs_from_messages(body["messages"], Modality.VLM)
        parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
        for number, part in enumerate(parts):
            name = f"image {number}"
            part["image"] = decode_image(image_bytes(part.pop("url"), name), name)
        try:
            inputs = processor.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tools=body.get("tools"),
                return_tensors="pt",
                return_dict=True,
                tokenize=True,
            )
        except TemplateError as error:
            raise Refusal(f"the chat template does not take these messages: {first_line(error)}") from error
        return to_model(self._attached.model, inputs)

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = super()._build_generation_config(body, *args, **kwargs)
        if body.get("temperature"):  # transformers' server leaves sampling off unless the checkpoint turns it on
            config.do_sample = True
        return config


def _check_fields(body: Mapping[str, Any]) -> None:
    """Refuse fields that would be ignored in silence."""
    if body.get("logprobs") or body.get("top_logprobs"):
        raise Refusal("logprobs are not served")
    wanted_format = body.get("response_format")
    if wanted_format is not None and wanted_format != {"type": "text"}:
        raise Refusal('response_format must be {"type": "text"}')


def _read_bias(bias: Any, vocabulary: int) -> dict[str, float]:
    """Return {token id: bias}, with the numbers as transformers takes them.

    Raises:
        Refusal: it is not of that form, or a token is outside of the vocabulary.
    """
    if not isinstance(bias, dict) or len(bias) > 1024:
        raise Refusal("logit_bias must be an object of token ids and numbers, at most 1,024")
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocabulary):
            raise Refusal(f"logit_bias takes token ids from 0 to {vocabulary - 1}; got {key[:80]!r}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise Refusal(f"logit_bias takes numbers from -100 to 100; got {str(value)[:80]}")
    return {key: float(value) for key, value in bias.items()}


def _fit(config: Any, body: Mapping[str, Any], prompt: int, text_config: Any) -> None:
    """Bound the answer by the model's positions.

    Raises:
        Refusal: the prompt, or the prompt and ``max_tokens``, are longer.
    """
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is None:
        return
    if prompt >= longest:
        raise Refusal(f"the prompt has {prompt:,} tokens with its images; the model takes {longest:,} with the answer")
    if body.get("max_tokens") is None:
        config.max_new_tokens = min(config.max_new_tokens, longest - prompt)
    elif prompt + config.max_new_tokens > longest:
        raise Refusal(
            f"the prompt has {prompt:,} tokens and max_tokens is {config.max_new_tokens:,}; the model takes "
            f"{longest:,} together"
        )


def build_app(attached: Attached, name: str, settings: Settings) -> Guard:
    """Return transformers' app behind the guard."""
    models, state = _Models(name, attached), _State(attached)
    chat = _Chat(attached, models, state)
    others: dict[str, Any] = {"completion_handler": None, "response_handler": None}
    others |= {"transcription_handler": None, "systemone_handler": None}  # the guard refuses their paths
    app = build_server(models, chat, **others, generation_state=state)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)

    @app.get("/metrics")  # type: ignore[untyped-decorator]
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(Refusal)  # type: ignore[untyped-decorator]
    async def refused(request: fastapi.Request, error: Refusal) -> JSONResponse:
        return _error(400, first_line(error))

    @app.exception_handler(fastapi.HTTPException)  # type: ignore[untyped-decorator]
    async def rejected(request: fastapi.Request, error: fastapi.HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(Exception)  # type: ignore[untyped-decorator]
    async def failed(request: fastapi.Request, error: Exception) -> JSONResponse:
        return _error(500, FAILED)

    return Guard(app, settings, registry, attached.prefill)


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)


class _Server(uvicorn.Server):
    """Ends with exit code 0 after SIGTERM or SIGINT; uvicorn's own would raise the signal again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(app: Guard, listener: socket.socket, grace: float) -> NoReturn:
    """Serve until SIGTERM or SIGINT; running requests then have ``grace`` seconds to finish. The process ends here."""
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=max(1, round(grace)), timeout_keep_alive=30
    )
    server = _Server(config)
    server.run(sockets=[listener])
    sys.stdout.flush()
    sys.stderr.flush()
    # a generation whose grace is over may still compute in its thread: an interpreter that ends under it aborts
    os._exit(0 if server.started else 1)
