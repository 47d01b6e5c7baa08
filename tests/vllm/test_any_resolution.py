"""LLaVA-NeXT and LLaVA-OneVision in vLLM: the answers and the kept tokens are those of the attached method.

Engines never keep a newline of a reduced image, which is ``attach(separators="none")``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokensieve
from tests.support import models, processors
from tests.support.families import FAMILIES, VARIANTS, VIDEO, like
from tests.vllm.engines import run_engine
from tokensieve import Reduction, Refusal
from tokensieve.ops import pixel_hash
from tokensieve.vllm import engine_options

LLM = {"hidden_size": 128, "intermediate_size": 256}  # four heads of 32: vLLM's kernels on a CPU have none smaller
PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168]]
LARGE = {"image_grid_pinpoints": [*PINPOINTS, [224, 224]]}  # 16 tiles: above 9, OneVision resamples
for name, more in (("llava-next", {"image_grid_pinpoints": PINPOINTS}), ("llava-onevision", LARGE)):
    wide = {"llm": FAMILIES[name].llm | LLM, "more": more}
    VARIANTS[f"{name}-wide"] = like(name, f"{name}-wide", **wide)
# as in the published checkpoints, which have no pooling head
onevision = VARIANTS["llava-onevision-wide"]
onevision.vision["vision_use_head"] = False

SAMPLING = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
METHODS = {
    "llava-next": [
        "random(keep=9)", "uniform(keep=0.6)", "pool(keep=12)", "divprune(keep=8)", "trsm(keep=7)", "vtc-cls(keep=6)",
        "fastervlm(keep=0.25)", "visionzip(keep=10)", "hired(keep=0.2)",
    ],
    "llava-onevision": [
        "random(keep=9)", "uniform(keep=0.6)", "pool(keep=12)", "divprune(keep=8)", "trsm(keep=7)", "vtc-cls(keep=6)",
        "visionzip(keep=10)", "hired(keep=0.2)",
    ],
}  # fmt: skip
NAMES = tuple(METHODS)


def picture(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# one mosaic of each shape, a picture so thin that its mosaic is one line, and two images in one prompt
PROMPTS: list[tuple[str, list[Image.Image]]] = [
    ("<image> what is this ?", [picture(1, 60, 100)]),
    ("which one is the first image <image> ?", [picture(2, 130, 64)]),
    ("<image> is the picture red ?", [picture(3, 100, 100)]),
    ("<image> what is blue ?", [picture(4, 20, 150)]),
    ("<image> or <image> A or B ?", [picture(5, 90, 40), picture(6, 50, 170)]),
]


def processor_of(name: str) -> Any:
    """Return the processor of a wide model."""
    like_next = processors.processor("llava-next")
    tokenizer, template = like_next.tokenizer, like_next.chat_template
    pinpoints = VARIANTS[f"{name}-wide"].more["image_grid_pinpoints"]
    if name == "llava-next":
        like_next.image_processor.image_grid_pinpoints = pinpoints
        return like_next
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    size = {"height": 56, "width": 56}
    images = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pinpoints)
    videos = LlavaOnevisionVideoProcessor(size=size)
    return LlavaOnevisionProcessor(images, tokenizer, videos, 16, "full", template)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of the wide models."""
    folders = {}
    for name in NAMES:
        folders[name] = tmp_path_factory.mktemp(name)
        models.build(f"{name}-wide").save_pretrained(folders[name])
        processor_of(name).save_pretrained(folders[name])
    return folders


@cache
def loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def expected(
    folder: Path, method: str, prompts: Sequence[tuple[str, list[Image.Image]]] = (), **attach: Any
) -> tuple[list[list[int]], dict[int, list[int]]]:
    """Return transformers' answers, and {pixel hash: kept tokens} of the images that lost some."""
    model, processor = loaded(folder)
    answers, kept = [], {}
    with tokensieve.attach(model, method, processor=processor, separators="none", **attach) as sieve:
        for text, images in prompts or PROMPTS:
            inputs = processor(text=text, images=images, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            answers.append(out[0, inputs["input_ids"].shape[1] :].tolist())
            for pixels, decision in zip(inputs["pixel_values"], sieve.last[0], strict=True):
                kept[int(pixel_hash(pixels))] = decision.anchors.tolist()
    return answers, kept


def requests(method: str, prompts: Sequence[tuple[str, list[Image.Image]]] = PROMPTS) -> list[dict[str, Any]]:
    name = method.split("(")[0]
    return [
        {
            "prompt": text,
            "multi_modal_data": {"image": images},
            "mm_processor_kwargs": {"tokensieve_method": name},
        }
        for text, images in prompts
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("positions", ["original", "contiguous"])
def test_answers_and_kept_tokens_are_those_of_the_attached_method(tmp_path, folders, name, positions):
    methods = METHODS[name] if positions == "original" else METHODS[name][:6:2]
    folder = str(folders[name])
    options = engine_options(folder, methods[0], allowed=[*methods[1:], "full"], positions=positions)
    caching = positions == "original"  # with the other policy, without vLLM's caches
    passes = [requests(method) for method in [*methods, "full", *methods[1:2] * caching]]
    out = run_engine(
        tmp_path, folder, *passes, sampling=SAMPLING, enable_prefix_caching=caching,
        mm_processor_cache_gb=4 * caching, block_size=32, **options,
    )  # fmt: skip
    answered = []
    for method, result in zip([*methods, "full"], out["passes"], strict=False):
        answers, kept = expected(folders[name], method, positions=positions)
        assert result["ids"] == answers, method
        assert {pixels: anchors for (pixels, _), anchors in result["kept"].items()} == kept, method
        answered += answers
    if caching:
        first, again = out["passes"][1], out["passes"][-1]
        assert again["ids"] == first["ids"]
        assert sum(again["cached_tokens"]) > sum(first["cached_tokens"]) == 0
    assert len({tuple(answer) for answer in answered}) > len(answered) // 2, "the answers hardly depend on the images"


RESAMPLED = picture(7, 300, 300)  # 16 tiles


def test_a_resampled_image_is_refused_where_a_method_reads_the_encoder_and_the_engine_goes_on(tmp_path, folders):
    name, folder = "llava-onevision", str(folders["llava-onevision"])
    large = [("<image> what is this ?", [RESAMPLED])]
    mixed = [*requests("divprune(keep=8)", large), *requests("vtc-cls(keep=6)")]  # one batch, in which one is resampled
    passes = [requests("vtc-cls(keep=6)", large), mixed, requests("visionzip(keep=5)", large), requests("full", large)]
    options = engine_options(folder, "vtc-cls(keep=6)", allowed=["divprune(keep=8)", "visionzip(keep=5)", "full"])
    read, both, merged, full = run_engine(tmp_path, folder, *passes, sampling=SAMPLING, **options)["passes"]
    for refused in (read, merged):
        assert "LLaVA-OneVision resamples an image of this size after its encoder" in refused["refused"]
    assert both["ids"][:1] == expected(folders[name], "divprune(keep=8)", large)[0]
    assert both["ids"][1:] == expected(folders[name], "vtc-cls(keep=6)")[0]
    assert max(both["encoded"]) > 1, "the images were not encoded together"
    assert full["ids"] == expected(folders[name], "full", large)[0]


def test_videos_stay_whole_beside_reduced_images(tmp_path, folders):
    folder = str(folders["llava-onevision"])
    model, processor = loaded(folders["llava-onevision"])
    frames = np.random.default_rng(8).integers(0, 256, (4, 60, 80, 3), dtype=np.uint8)
    image, text = picture(9, 60, 100), "what <image> is the <video> red ?"
    alone = processor(text="<image>", images=[image], return_tensors="pt")
    both = processor(text=text, images=[image], videos=[frames], return_tensors="pt", do_sample_frames=False)
    with torch.no_grad(), tokensieve.attach(model, "divprune(keep=8)", separators="none") as sieve:
        model.generate(**alone, max_new_tokens=1, do_sample=False)
        (decision,) = sieve.last[0]
    video = Reduction.identity(int((both["input_ids"] == VIDEO).sum()), device=decision.anchors.device)
    with torch.no_grad(), tokensieve.attach(model, [[decision, video]]):
        answer = model.generate(**both, max_new_tokens=8, do_sample=False)[0, both["input_ids"].shape[1] :]
    prompt = {
        "prompt": text,
        "multi_modal_data": {"image": [image], "video": [frames]},
        "mm_processor_kwargs": {"do_sample_frames": False},
    }
    options = engine_options(folder, "divprune(keep=8)")
    (result,) = run_engine(tmp_path, folder, [prompt], sampling=SAMPLING, **options)["passes"]
    assert result["ids"] == [answer.tolist()]
    assert result["prompt_tokens"] == [both["input_ids"].shape[1] - decision.total + 8]


def test_a_checkpoint_that_vllm_packs_otherwise_is_refused(tmp_path, folders):
    config = json.loads((folders["llava-onevision"] / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_aspect_ratio": "anyres_max_4"}))
    with pytest.raises(Refusal, match="vision_aspect_ratio='anyres_max_4', and vLLM packs images as with"):
        engine_options(str(tmp_path), "uniform")
