"""The checks of one chat request. None of them decodes an image or changes the request, except for fetched images."""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from tokensieve.errors import DataError, Refusal
from tokensieve.serve.settings import Settings
from tokensieve.vllm.settings import KEEP, METHOD

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # others have decoders that run programs or are rarely tested
ROLES = ("system", "developer", "user", "assistant", "tool")
COUNTED = ("tools", "tool_choice", "response_format")  # they become text of the prompt or a grammar: characters count
NUMBERS = {  # parameters of sampling: (lowest, highest)
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "repetition_penalty": (0.1, 10),
}
SWITCHES = (
    "stream",
    "logprobs",
    "parallel_tool_calls",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)
CHECKED = (
    "model",
    "messages",
    "mm_processor_kwargs",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "n",
    "top_k",
    "top_logprobs",
    "seed",
    "stop",
    "logit_bias",
    *COUNTED,
)
PASSED = ("stream_options", "user", "cache_salt")  # they concern this answer only, and an engine checks them
FIELDS = {*CHECKED, *NUMBERS, *SWITCHES, *PASSED}
"""What a request may hold. Any other field is refused: vLLM has some that jump the queue ("priority"), cut the prompt
within an image ("truncate_prompt_tokens"), add text that is not counted ("documents"), or change what the prompt is
made of ("chat_template", "media_io_kwargs")."""
MESSAGE_TEXTS = ("name", "tool_call_id", "refusal", "reasoning", "reasoning_content")
MOST_BIASES, MOST_LOGPROBS, MOST_TOP_K = 1024, 20, 1_000_000
THINNEST = 200
"""The longer side of an image is at most this many times the shorter: image processors that scale the shorter side to a
fixed length would make gigabytes of a line of pixels."""
NOT_JSON_TEXT = re.compile("[\ud800-\udfff\0]")


class Rejection(Exception):
    """A request that is answered with an error.

    Args:
        status: status code of HTTP.
        reason: one word or two for the metrics and the field ``code``.
        message: one line with the value received and the values allowed.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class _Image:
    """A reference to an image inside a request: the dict and the key under which its URL stands."""

    holder: dict[str, Any]
    key: str
    name: str

    @property
    def url(self) -> str:
        return str(self.holder[self.key])


def read_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        Rejection: it is not UTF-8, not JSON, nested too deeply, or no object.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise Rejection(400, "not_json", "the body is JSON nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or an integer of too many digits
        raise Rejection(400, "not_json", f"the body is not JSON: {_short(str(error))}") from None
    if not isinstance(value, dict):
        raise Rejection(400, "wrong_type", f"the body must be a JSON object; got {_kind(value)}")
    return value


def check(body: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Check a chat request against the settings; return it as the engine receives it, with all images as data URLs.

    Raises:
        Rejection: the request is wrong or exceeds a limit.
    """
    limits = settings.limits
    _check_fields(body)
    _check_model(body, settings)
    _check_sampling(body, limits.answer_tokens)
    _check_choice(body, settings)
    images, characters = _read_messages(body.get("messages"))
    characters += sum(len(json.dumps(body[key])) for key in COUNTED if body.get(key))
    if characters > limits.prompt_characters:
        raise Rejection(
            400,
            "prompt_too_long",
            f"the texts have {characters:,} characters; the limit is {limits.prompt_characters:,}",
        )
    texts = [*texts_of(body), json.dumps(body.get("tools") or "", ensure_ascii=False)]
    for placeholder in settings.placeholders:
        if any(placeholder in text for text in texts):
            raise Rejection(
                400, "placeholder", f"leave {placeholder} out of the text: each image has its place among the parts"
            )
    if len(images) > limits.images:
        raise Rejection(400, "too_many_images", f"the request has {len(images):,} images; the limit is {limits.images}")
    deadline, most_bytes = time.monotonic() + limits.body_seconds, limits.body_bytes  # of all images on the web
    for image in images:
        if not image.url.startswith("data:"):
            content = _fetched(image, settings, most_bytes, deadline)
            most_bytes -= len(content)
            image.holder[image.key] = "data:image/*;base64," + base64.b64encode(content).decode("ascii")
        _check_pixels(image_bytes(image.url, image.name), image.name, limits.pixels)
    return {**body, "add_special_tokens": True} if settings.begin_of_text else body


def image_bytes(url: str, name: str) -> bytes:
    """Return the bytes of a data URL in base64.

    Raises:
        Rejection: the URL is malformed.
    """
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Rejection(
            400, "broken_image", f"{name} must be a data URL such as data:image/png;base64,…; got {_short(url)!r}"
        )
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejection(400, "broken_image", f"{name} is not base64: {error}") from None


def _check_fields(body: dict[str, Any]) -> None:
    """Refuse fields that no check here bounds."""
    for key, value in body.items():
        if key not in FIELDS and value is not None:
            raise Rejection(
                400, "unknown_field", f"the field {_short(key)!r} is not served; docs/serving.md lists those that are"
            )


def _check_model(body: dict[str, Any], settings: Settings) -> None:
    name = body.get("model")
    known = ", ".join(settings.models)
    if not isinstance(name, str):
        raise Rejection(400, "wrong_type", f"model must be a string such as {known}; got {_kind(name)}")
    if name not in settings.models:
        raise Rejection(404, "unknown_model", f"the model {_short(name)!r} is not served; served: {known}")


def _check_sampling(body: dict[str, Any], longest: int) -> None:
    for key, (low, high) in NUMBERS.items():
        value = body.get(key)
        if value is not None and not (_number(value) and low <= value <= high):
            raise _wrong(key, f"a number from {low} to {high}", value)
    whole_numbers = {"max_tokens": (1, longest), "max_completion_tokens": (1, longest), "min_tokens": (0, longest)}
    whole_numbers |= {"top_k": (-1, MOST_TOP_K), "top_logprobs": (0, MOST_LOGPROBS)}
    for key, (low, high) in whole_numbers.items():
        value = body.get(key)
        if value is not None and not (_whole(value) and low <= value <= high):
            raise _wrong(key, f"a whole number from {low} to {high}", value)
    for key in SWITCHES:
        if body.get(key) is not None and not isinstance(body[key], bool):
            raise _wrong(key, "true or false", body[key])
    seed, stop, biases = body.get("seed"), body.get("stop"), body.get("logit_bias")
    if body.get("n") is not None and not (_whole(body["n"]) and body["n"] == 1):  # places are counted per answer
        raise _wrong("n", "1", body["n"])
    if seed is not None and not (_whole(seed) and -(2**63) <= seed < 2**63):
        raise _wrong("seed", "a whole number of 64 bits", seed)
    if biases is not None and not (isinstance(biases, dict) and len(biases) <= MOST_BIASES):
        raise _wrong("logit_bias", f"an object of at most {MOST_BIASES:,} token ids and numbers", biases)
    stops = stop if isinstance(stop, list) else [stop]
    if stop is not None and not (0 < len(stops) <= 16 and all(isinstance(s, str) and 0 < len(s) <= 256 for s in stops)):
        raise _wrong("stop", "a string, or up to 16, of up to 256 characters", stop)
    if not isinstance(body.get("tools") or [], list) or any(not isinstance(t, dict) for t in body.get("tools") or []):
        raise _wrong("tools", "a list of objects", body["tools"])


def _check_choice(body: dict[str, Any], settings: Settings) -> None:
    """Check the method and the budget that a request names."""
    choice = body.get("mm_processor_kwargs")
    if choice is None:
        return
    if not isinstance(choice, dict) or any(key not in (METHOD, KEEP) for key in choice):
        raise _wrong("mm_processor_kwargs", f"an object with some of {METHOD}, {KEEP}", choice)
    method, keep = choice.get(METHOD), choice.get(KEEP)
    if method is not None and (not isinstance(method, str) or method not in settings.methods):
        allowed = f"; allowed: {', '.join(settings.methods)}" if settings.methods else ": the server allows no choice"
        raise Rejection(400, "wrong_option", f"{METHOD} {_short(json.dumps(method))} is refused{allowed}")
    if keep is None:
        return
    if not settings.allow_keep:
        raise Rejection(400, "wrong_option", f"{KEEP} is refused: the server allows no choice of the budget")
    if not _number(keep) or (keep < 1 if isinstance(keep, int) else not 0 < keep <= 1):
        raise Rejection(
            400,
            "wrong_option",
            f"{KEEP} must be a number of tokens (64) or a share (0.25); got {_short(json.dumps(keep))}",
        )


def _read_messages(messages: Any) -> tuple[list[_Image], int]:
    """Return the images of all messages, and the number of characters of their texts."""
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "a list of at least one message", messages)
    images: list[_Image] = []
    characters = 0
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise _wrong(name, f"an object with a role among {', '.join(ROLES)}", message)
        for key, value in message.items():
            if key in MESSAGE_TEXTS and value is not None:
                characters += _length(value, f"{name}.{key}")
            elif key not in ("role", "content", "tool_calls", *MESSAGE_TEXTS) and value:
                raise Rejection(400, "unknown_field", f"{name}.{_short(key)} is not served")
        characters += _check_calls(message.get("tool_calls"), name)
        content = message.get("content")
        if content is None and message["role"] == "assistant":
            continue
        if isinstance(content, str):
            characters += _length(content, f"{name}.content")
            continue
        if not isinstance(content, list):
            raise _wrong(f"{name}.content", "a string or a list of parts", content)
        for place, part in enumerate(content):
            where_part = f"{name}.content[{place}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and set(part) == {"type", "text"}:
                characters += _length(part["text"], f"{where_part}.text")
            elif kind == "image_url" and set(part) == {"type", "image_url"}:
                images.append(_image(part, where_part))
            else:
                raise _wrong(
                    where_part, '{"type": "text", "text": …} or {"type": "image_url", "image_url": {"url": …}}', part
                )
    return images, characters


def _check_calls(calls: Any, name: str) -> int:
    """Check the tool calls of an earlier answer; return the number of their characters."""
    if calls is None:
        return 0
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not _is_object(function):
            raise _wrong(
                f"{name}.tool_calls", 'a list of {"function": {"name": …, "arguments": JSON of an object}}', calls
            )
    return len(json.dumps(calls))


def _is_object(function: dict[str, Any]) -> bool:
    """Return whether the arguments of a call are an object, or the JSON of one."""
    arguments = function.get("arguments")
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(arguments) if isinstance(arguments, str) else arguments, dict)
    return False


def _image(part: dict[str, Any], name: str) -> _Image:
    value = part["image_url"]
    image = _Image(part, "image_url", name)
    if isinstance(value, dict) and set(value) <= {"url", "detail"}:
        image = _Image(value, "url", name)
        value = value.get("url")
    if not isinstance(value, str):
        raise _wrong(f"{name}.image_url", 'a URL or {"url": …}', value)
    return image


def _length(text: Any, name: str) -> int:
    if not isinstance(text, str):
        raise _wrong(name, "a string", text)
    if NOT_JSON_TEXT.search(text):
        raise Rejection(400, "wrong_type", f"{name} is not valid text: half of a character, or a NUL")
    return len(text)


def _fetched(image: _Image, settings: Settings, most_bytes: int, deadline: float) -> bytes:
    """Return the content of a remote image."""
    from tokensieve.serve.fetch import fetch

    if not image.url.startswith(("http://", "https://")):
        raise Rejection(
            400,
            "broken_image",
            f"{image.name} must be a data URL{' or an http(s) URL' if settings.allow_urls else ''}; "
            f"got {_short(image.url)!r}",
        )
    if not settings.allow_urls:
        raise Rejection(
            400,
            "remote_image",
            f"{image.name} is an image on the web; send it as a data URL (the server runs without --allow-urls)",
        )
    try:
        return fetch(image.url, most_bytes, deadline)
    except Refusal as error:
        raise Rejection(400, "remote_image", f"{image.name}: {error}") from None


def _check_pixels(content: bytes, name: str, limit: int) -> None:
    """Read the header of an image, without decoding its pixels."""
    from PIL import Image

    from tokensieve.images import image_errors

    try:
        with image_errors(name), Image.open(BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
    except DataError as error:
        if (many := re.search(r"[\d,]+ pixels", str(error))) is not None:  # so many that Pillow itself refuses
            raise Rejection(400, "image_too_large", f"{name} has {many[0]}; the limit is {limit:,} pixels") from None
        raise Rejection(400, "broken_image", f"{error}; allowed: {', '.join(FORMATS)}") from None
    if max(width, height) > THINNEST * min(width, height):
        raise Rejection(
            400,
            "image_too_large",
            f"{name} has {width:,} x {height:,} pixels; the longer side may be {THINNEST} times the shorter",
        )
    if width * height > limit:
        raise Rejection(
            400, "image_too_large", f"{name} has {width:,} x {height:,} pixels; the limit is {limit:,} pixels"
        )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(name: str, allowed: str, value: Any) -> Rejection:
    return Rejection(400, "wrong_type", f"{name} must be {allowed}; got {_short(json.dumps(value))}")


def _kind(value: Any) -> str:
    kinds = {type(None): "nothing", list: "a list", str: "a string", bool: "true or false", dict: "an object"}
    return kinds.get(type(value), "a number")


def _short(text: str, length: int = 80) -> str:
    return " ".join((text if len(text) <= length else text[:length] + "…").split())


def texts_of(body: dict[str, Any]) -> Iterator[str]:
    """Yield every text of a checked request."""
    for message in body["messages"]:
        content = message.get("content") or ""
        yield from [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]
