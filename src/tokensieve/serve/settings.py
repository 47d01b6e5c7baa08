"""Limits and options of the guard. They travel to vLLM's process in an environment variable."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field

from tokensieve.errors import Refusal

VARIABLE = "TOKENSIEVE_SERVE"


@dataclass(frozen=True)
class Limits:
    """Set what one request may hold, and how many may run.

    Attributes:
        body_bytes: bytes of a request's body.
        body_seconds: seconds in which the whole body must arrive.
        images: images of a request.
        pixels: decoded pixels of an image.
        prompt_characters: characters of all texts of a request.
        answer_tokens: the largest ``max_tokens`` that a request may name.
        concurrency: requests that the engine receives at the same time.
        queue: requests that wait for a place in the engine.
        receiving: requests whose bodies arrive at the same time.
    """

    body_bytes: int = 32_000_000
    body_seconds: float = 30.0
    images: int = 8
    pixels: int = 40_000_000
    prompt_characters: int = 100_000
    answer_tokens: int = 4096
    concurrency: int = 8
    queue: int = 64
    receiving: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            lowest = {"queue": 0, "images": 0, "body_seconds": 0.1}.get(name, 1)
            # NaN is below no number, hence the negation
            if not value >= lowest:
                raise Refusal(f"{name} must be at least {lowest}; got {value}")


@dataclass(frozen=True)
class Settings:
    """Set how the guard treats requests.

    Attributes:
        models: names that a request's ``model`` may have.
        limits: limits of each request and of the server.
        allow_urls: fetch images given as http(s) URLs from public addresses.
        methods: method specs that a request may choose.
        allow_keep: a request may choose its budget.
        paths: further POST paths, passed on with limits of size, time and number only.
        begin_of_text: ask vLLM for the tokenizer's special tokens, which it leaves out of a rendered chat.
        placeholders: tokens that stand for an image or a video; vLLM would take them in a text for one.
    """

    models: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)
    allow_urls: bool = False
    methods: tuple[str, ...] = ()
    allow_keep: bool = False
    paths: tuple[str, ...] = ()
    begin_of_text: bool = False
    placeholders: tuple[str, ...] = ()

    def to_environment(self) -> dict[str, str]:
        """Return the environment variable that :meth:`from_environment` reads."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the settings that `tokensieve serve` wrote.

        Raises:
            Refusal: the variable is missing.
        """
        text = os.environ.get(VARIABLE)
        if text is None:
            raise Refusal(f"the guard reads its settings from {VARIABLE}, which `tokensieve serve` sets; it is not set")
        values = json.loads(text)
        lists = {name: tuple(values[name]) for name in ("models", "methods", "paths", "placeholders")}
        return cls(**{**values, **lists, "limits": Limits(**values["limits"])})
