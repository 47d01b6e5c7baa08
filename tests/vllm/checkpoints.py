"""Tiny random checkpoints with their processors, wide enough for vLLM's kernels, and what transformers answers on them.

A prompt is a pair: its text with ``IMG`` where an image stands, and its images.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import tokensieve
from tests.support.families import BOS, BREAK, END, EOS, FAMILIES, IMAGE, PAD, START, VARIANTS, VIDEO, like
from tests.support.models import build

WIDTH = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
"""vLLM's attention on a CPU takes heads of 32 and more."""

PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'user' %}ask {% else %}tell {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMG{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} tell{% endif %}"
)


def tokenizer(
    special: dict[str, int], image: str, named: dict[str, str] | None = None, plain: dict[str, int] | None = None
) -> Any:
    """Return a tokenizer of the tiny models' 200 ids: single letters and a few words."""
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, image: IMAGE} | special
    names = {number: f"w{number}" for number in range(200)}
    words = ["<unk>", "ask", "tell", "what", "is", "the", "colour", "shape", "of", "this", "one", *string.digits]
    names |= dict(enumerate([*words, *string.ascii_letters], 5)) | {
        number: name for name, number in (special | (plain or {})).items()
    }
    core = Tokenizer(WordLevel({name: number for number, name in names.items()}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    core.add_tokens([AddedToken(name, normalized=False) for name in plain or {}])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=PLAIN.replace("IMG", f" {image} "), padding_side="left",
        extra_special_tokens=named or {},
    )  # fmt: skip


def pixtral(merge: int) -> Any:
    from transformers import PixtralProcessor
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    images = PixtralImageProcessorPil(size={"longest_edge": 224}, patch_size={"height": 14, "width": 14})
    words = tokenizer({"[IMG_BREAK]": BREAK, "[IMG_END]": END}, "[IMG]")
    return PixtralProcessor(images, words, 14, merge, chat_template=words.chat_template)


def internvl() -> Any:
    from transformers import InternVLProcessor, InternVLVideoProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    side = {"height": 112, "width": 112}
    images = GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, min_patches=1, max_patches=4)
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = tokenizer(
        {"<img>": START, "</img>": END, "<video>": VIDEO}, "<IMG_CONTEXT>", named | {"video_token": "<video>"}
    )
    return InternVLProcessor(images, words, InternVLVideoProcessor(size=side), 16, words.chat_template)


def idefics3() -> Any:
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    # rows and columns of tiles, and the newline after each row of them, are tokens of the prompt, not special ones
    marks = {f"<row_{row}_col_{column}>": 80 + 4 * row + column for row in range(1, 4) for column in range(1, 4)}
    special = {"<fake_token_around_image>": START, "<end_of_utterance>": END, "<global-img>": BREAK}
    words = tokenizer(special, "<image>", plain=marks | {"\n": 100, "\n\n": 101})
    images = Idefics3ImageProcessorPil(size={"longest_edge": 224}, max_image_size={"longest_edge": 112})
    return Idefics3Processor(images, words, 16, words.chat_template)


def wide(name: str, **more: Any) -> None:
    VARIANTS[f"{name}-wide"] = like(name, f"{name}-wide", llm=FAMILIES[name].llm | WIDTH | {"head_dim": 32} | more)


wide("pixtral")
wide("mistral3")
wide("internvl")
wide("idefics3")

PROCESSORS = {"pixtral": lambda: pixtral(1), "mistral3": lambda: pixtral(2), "internvl": internvl, "idefics3": idefics3}
IMAGE_TOKEN = {"pixtral": "[IMG]", "mistral3": "[IMG]", "internvl": "<IMG_CONTEXT>", "idefics3": "<image>"}


def save(name: str, folder: Path) -> str:
    """Save a checkpoint of a family; return its folder."""
    build(f"{name}-wide").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if config["vision_config"]["model_type"] == "pixtral":  # as published: older releases know no other name
        theta = config["vision_config"].pop("rope_parameters")["rope_theta"]
        config["vision_config"]["rope_theta"] = theta
        (folder / "config.json").write_text(json.dumps(config))
    PROCESSORS[name]().save_pretrained(folder)
    return str(folder)


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def engine_prompts(name: str, prompts: Sequence[tuple[str, list[Image.Image]]], **options: Any) -> list[dict[str, Any]]:
    """Return prompts for an engine; ``options`` are the choices of each request."""
    return [
        {
            "prompt": words.replace("IMG", IMAGE_TOKEN[name]),
            "multi_modal_data": {"image": images},
            "mm_processor_kwargs": options,
        }
        for words, images in prompts
    ]


class Expected:
    """What transformers answers with an attached method, prompt by prompt."""

    def __init__(self, name: str, folder: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.name = name
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[tuple[str, list[Image.Image]]], method: str, tokens: int = 8, **attach: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Return the greedy tokens of each prompt, and the kept tokens of each image in order."""
        answers, kept = [], []
        with tokensieve.attach(self.model, method, processor=self.processor, **attach) as sieve:
            for words, images in prompts:
                prompt = words.replace("IMG", IMAGE_TOKEN[self.name])
                inputs = self.processor(text=prompt, images=images, return_tensors="pt")
                out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
                answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
                kept += [decision.anchors.tolist() for decision in sieve.last[0]]
        return answers, kept
