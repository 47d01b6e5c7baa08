"""Requests that could be mixed up: one engine, the same images with other methods, budgets, words and chats."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

import tokensieve
from tests.vllm.apart import run_apart
from tests.vllm.test_engine import options, serve
from tokensieve import reference
from tokensieve.ops import pixel_hash
from tokensieve.reference.benchmark import benchmark
from tokensieve.reference.vilt import ASKED

CHOICES = (
    ("vtc-cls", 36),
    ("vtc-cls", 1),
    ("trsm", 36),
    ("trsm", 1),
    ("divprune", 36),
    ("visionzip", 24),
    ("vtc-cls", 144),
    ("vtc-cls", 10**6),  # more than there are: all
)
TOKENS = 6
Chat = list[dict[str, Any]]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return reference.load()


def turn(text: str, role: str = "user", images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def look_alikes() -> list[tuple[Chat, list[Image.Image]]]:
    """Return chats whose images or words differ little, or in their place only."""
    rows = benchmark(scenes=3, types=ASKED)
    first, second = rows[0].image, rows[7].image
    near = first.copy()
    red, green, blue = near.getpixel((0, 0))
    near.putpixel((0, 0), (255 - red, green, blue))
    # the same bytes, in three sizes
    blocks = [Image.frombytes("RGB", size, bytes(range(240)) * 15) for size in ((30, 40), (40, 30), (60, 20))]
    ask, other = rows[0].question, rows[3].question
    assert ask != other
    chats: list[tuple[Chat, list[Image.Image]]] = [
        ([turn(ask, images=1)], [image]) for image in (first, near, second, *blocks)
    ]
    chats += [
        ([turn(other, images=1)], [first]),  # words that differ after the image
        ([turn(ask, images=2)], [first, first]),
        ([turn(ask, images=2)], [first, second]),
        ([turn(ask, images=2)], [second, first]),
        ([turn(ask, images=2)], [first, near]),
        ([turn("be brief", "system"), turn(ask, images=1)], [first]),
        ([turn(ask, images=1), turn("red", "assistant"), turn(other)], [first]),
        ([turn(ask, images=1), turn("red", "assistant"), turn(other, images=1)], [first, second]),
        ([turn(ask, images=1)], [Image.new("RGB", (1, 1), "red")]),
        ([turn(ask, images=1)], [Image.new("RGB", (1, 2000), "blue")]),
    ]
    return chats


def attached(
    loaded: Any, texts: Sequence[str], images: Sequence[list[Image.Image]], method: str, keep: int
) -> tuple[list[list[int]], dict[int, set[tuple[int, ...]]]]:
    """Return the greedy token ids under transformers, and {pixel hash: the sets of tokens kept of that image}."""
    model, processor = loaded
    answers, kept = [], {}
    for text, shown in zip(texts, images, strict=True):
        inputs = processor(images=shown, text=text, return_tensors="pt")
        with (
            torch.inference_mode(),
            tokensieve.attach(model, method, keep=min(keep, 144), processor=processor) as sieve,
        ):
            out = model.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
            (decisions,) = sieve.last
        answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
        for pixels, decision in zip(inputs["pixel_values"], decisions, strict=True):
            kept.setdefault(int(pixel_hash(pixels)), set()).add(tuple(decision.anchors.tolist()))
    return answers, kept


def test_nothing_is_mixed_up_by_the_caches(loaded):
    _, processor = loaded
    chats = look_alikes()
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat, _ in chats]
    images = [shown for _, shown in chats]
    prompts = []
    # neighbours share text and image and differ in the choice; each is asked twice, without and with a client's id
    for named in (False, True):
        for text, shown in zip(texts, images, strict=True):
            for method, keep in CHOICES:
                prompt: dict[str, Any] = {"prompt": text, "multi_modal_data": {"image": shown}}
                prompt["mm_processor_kwargs"] = {"tokensieve_method": method, "tokensieve_keep": keep}
                if named:  # an id of the image, not of the request
                    names = [hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest() for image in shown]
                    prompt["multi_modal_uuids"] = {"image": names}
                prompts.append(prompt)
    methods = list(dict.fromkeys(name for name, _ in CHOICES))
    engine = options(f"{methods[0]}(keep=36)", allowed=[f"{name}(keep=36)" for name in methods[1:]])
    engine |= {"block_size": 32}
    (ran,) = run_apart(serve, engine, [prompts], TOKENS, (), True)["passes"]
    assert sum(count > 0 for count in ran["cached"]) > 50  # prompts of fewer tokens than a block are not cached
    decided: dict[Any, set[tuple[int, ...]]] = {}
    for call in ran["calls"]:
        for pixels, method, budget, _, anchors in call:
            decided.setdefault((method, budget, pixels), set()).add(tuple(anchors))
    half, step = len(prompts) // 2, len(CHOICES)
    distinct = set()
    for number, (method, keep) in enumerate(CHOICES):
        expected, kept = attached(loaded, texts, images, method, keep)
        distinct.add(str(expected))
        assert ran["ids"][number:half:step] == expected, (method, keep)
        assert ran["ids"][half + number :: step] == expected, (method, keep, "with ids")
        if keep < 144:
            assert {pixels: decided[method, keep, pixels] for pixels in kept} == kept, (method, keep)
    assert len(distinct) >= 6  # methods change answers, so equality is no coincidence
