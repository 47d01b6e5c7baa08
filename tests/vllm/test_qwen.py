"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in vLLM, against transformers with the same method attached."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tokensieve
from tests.support.methods import FIRST_TUNED
from tests.vllm.engines import run_engine
from tests.vllm.tiny_qwen import SERVED, clip, picture, prompt, save
from tokensieve.engine.connector.decide import ConnectorEvidence, decide
from tokensieve.engine.handoff import EncoderOutputs
from tokensieve.ops import pixel_hash
from tokensieve.reduction import Reduction
from tokensieve.vllm import engine_options
from tokensieve.vllm.model import DIGIT
from tokensieve.vllm.plan import PLAN, ImagePlan
from tokensieve.vllm.settings import KEEP, METHOD, read_config

GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
DENSE = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"]
PREFIX_BLOCK = 32


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Return a function from a family to its tiny checkpoint, processor and model under transformers."""
    made: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in made:
            made[name] = Served(save(name, tmp_path_factory.mktemp(name)))
        return made[name]

    return of


class Served:
    def __init__(self, folder):
        self.folder = folder
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()

    def inputs(self, request: dict[str, Any]) -> Any:
        shown = request["multi_modal_data"]
        given: dict[str, Any] = {"images": shown["image"]} if "image" in shown else {}
        if "video" in shown:
            given["videos"] = [torch.tensor(frames).permute(0, 3, 1, 2) for frames, _ in shown["video"]]
            given["video_metadata"] = [
                {key: value for key, value in data.items() if key != "do_sample_frames"} for _, data in shown["video"]
            ]
            given["do_sample_frames"] = False
        return self.processor(text=[request["prompt"]], return_tensors="pt", **given)

    def answer(self, request: dict[str, Any], method: Any, **options: Any) -> tuple[list[int], Any]:
        """Return the greedy token ids, and the decision about each image and video of the prompt."""
        if isinstance(method, str):
            options["processor"] = self.processor
        with tokensieve.attach(self.model, method, **options) as sieve:
            ids = self.model.generate(**self.inputs(request), max_new_tokens=8, do_sample=False)[0, -8:].tolist()
            return ids, sieve.last[0]

    def replayed(self, request: dict[str, Any], method: str, whole: Any, **options: Any) -> tuple[list[int], Any]:
        """Return the same where the images and videos of which ``whole`` is true stay whole."""
        _, decisions = self.answer(request, method)
        decisions = [Reduction.identity(d.total) if whole(i, d) else d for i, d in enumerate(decisions)]
        return self.answer(request, [decisions], **options)[0], decisions

    def hashes(self, request: dict[str, Any]) -> list[int]:
        """Return the number of each image that the engine knows it by."""
        inputs = self.inputs(request)
        parts = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(-1).tolist())
        return [int(pixel_hash(pixels)) for pixels in parts]


def requests(method: str = "", **options: Any) -> list[dict[str, Any]]:
    """Return a ragged batch of prompts; the number of patches of some grids is no multiple of the window."""
    options |= {METHOD: method} if method else {}
    return [
        prompt(picture(84, 140, 1), **options),
        prompt(picture(200, 150, 2), text="and the second picture", **options),
        prompt(picture(300, 170, 3), picture(60, 230, 4), text="what is first and what is second ?", **options),
        prompt(
            picture(330, 330, 5),
            picture(58, 58, 6),
            picture(110, 160, 7),
            text="what is the colour of table 2 and of table 3 ?",
            **options,
        ),
    ]


def connector_methods(folder: Any) -> list[str]:
    """Return the spec of every connector method that an engine of this model runs."""
    specs = []
    for info in tokensieve.list_methods():
        spec = FIRST_TUNED.get(info.name, info.name)
        if "keep" in info.parameters and "keep" not in spec:
            spec = f"{info.name}(keep=7)"
        if info.stage != "connector" or info.name == "full":
            continue
        try:
            engine_options(str(folder), spec)
        except tokensieve.Refusal:
            continue
        specs.append(spec)
    return specs


def name_of(spec: str) -> str:
    return spec.split("(")[0]


def assert_equal(of: Served, requests: list[Any], expected: list[Any], run: dict[str, Any], what: str) -> None:
    for request, (ids, decisions), got, length in zip(
        requests, expected, run["ids"], run["prompt_tokens"], strict=True
    ):
        kept = {pixels: anchors for (pixels, _), anchors in run["kept"].items()}
        for pixels, decision in zip(of.hashes(request), decisions, strict=True):
            assert kept[pixels] == decision.anchors.tolist(), (what, request["prompt"])
        dropped = sum(decision.total - decision.slots for decision in decisions)
        assert length == of.inputs(request)["input_ids"].shape[1] - dropped, (what, request["prompt"])
        assert got == ids, (what, request["prompt"])


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_every_method_answers_as_under_transformers(served, name, tmp_path):
    """One engine, every connector method by request; positions are original, and prefixes are cached."""
    of = served(name)
    specs = connector_methods(of.folder)
    assert {"divprune", "trsm", "vtc-cls", "visionzip", "prumerge", "mmtok", "pool"} <= set(map(name_of, specs))
    options = engine_options(str(of.folder), "full", allowed=specs)
    passes = [requests(name_of(spec)) for spec in specs]
    again = [requests(name_of(spec)) for spec in specs[:3]]
    made = run_engine(
        tmp_path, str(of.folder), requests(), *passes, *again, sampling=GREEDY, block_size=PREFIX_BLOCK, **options
    )
    whole, *reduced = made["passes"]
    assert whole["ids"] == [of.answer(request, "full")[0] for request in requests()]
    different = 0
    for spec, run in zip(specs, reduced, strict=False):
        expected = [of.answer(request, spec) for request in requests()]
        assert_equal(of, requests(), expected, run, spec)
        different += run["ids"] != whole["ids"]
    assert different == len(specs)
    for first, second in zip(reduced, reduced[len(specs) :], strict=False):
        assert second["ids"] == first["ids"]
        assert sum(second["cached_tokens"]) > 0


def test_experts_answer_as_the_same_kept_tokens_under_transformers(served, tmp_path):
    of, specs = served("qwen3-vl-moe"), ["divprune(keep=7)", "vtc-cls(keep=7)", "trsm(keep=7)", "visionzip(keep=9)"]
    options = engine_options(str(of.folder), specs[0], allowed=specs[1:])
    passes = [requests(name_of(spec)) for spec in specs]
    made = run_engine(tmp_path, str(of.folder), *passes, sampling=GREEDY, **options)
    for spec, run in zip(specs, made["passes"], strict=True):
        assert_equal(of, requests(), [of.answer(request, spec) for request in requests()], run, spec)


@pytest.mark.parametrize("name", DENSE)
def test_contiguous_positions_small_images_and_chunks(served, name, tmp_path):
    """Images of fewer than 20 tokens stay whole; no prefix is cached, and prompts are prefilled in pieces."""
    of, specs = served(name), ["divprune(keep=7)", "pool(keep=6)", "vtc-cls(keep=7)"]
    for positions, chunk in (("contiguous", {}), ("original", {"max_num_batched_tokens": 24})):
        options = engine_options(str(of.folder), specs[0], allowed=specs[1:], positions=positions, from_tokens=20)
        passes = [requests(name_of(spec)) for spec in specs]
        made = run_engine(
            tmp_path, str(of.folder), *passes, sampling=GREEDY, enable_prefix_caching=False, **options, **chunk
        )
        for spec, run in zip(specs, made["passes"], strict=True):
            expected = [
                of.replayed(request, spec, lambda number, decision: decision.total < 20, positions=positions)
                for request in requests()
            ]
            assert_equal(of, requests(), expected, run, f"{positions} {spec}")
