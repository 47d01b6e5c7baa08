"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL in vLLM, against transformers with the same method attached."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tokensieve
from tests.support.methods import FIRST_TUNED
from tests.vllm.engines import run_engine
from tests.vllm.tiny_qwen import clip, picture, prompt, save
from tokensieve.engine.connector.decide import ConnectorEvidence, decide
from tokensieve.engine.handoff import EncoderOutputs
from tokensieve.models.qwen_vl import QwenVL
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


def test_experts_answer_as_under_transformers(served, tmp_path, monkeypatch):
    """Under transformers the family is not served; its vision encoder is Qwen3-VL's."""
    monkeypatch.setattr(QwenVL, "model_types", (*QwenVL.model_types, "qwen3_vl_moe"))
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


# -- videos -----------------------------------------------------------------------------------------------------------


def with_videos(**options: Any) -> list[dict[str, Any]]:
    video = clip(4, 112, 140, 8)
    return [prompt(video, **options), prompt(picture(84, 140, 1), video, picture(60, 230, 4), **options)]


@pytest.mark.parametrize("name", DENSE)
def test_videos_beside_images_stay_whole(served, name, tmp_path):
    of, spec = served(name), "vtc-cls(keep=7)"
    made = run_engine(tmp_path, str(of.folder), with_videos(), sampling=GREEDY, **engine_options(str(of.folder), spec))
    (run,) = made["passes"]
    for request, got, length in zip(with_videos(), run["ids"], run["prompt_tokens"], strict=True):
        shown = "<|video_pad|>" in request["prompt"].split("<|image_pad|>")[0]
        video = 0 if shown else 1
        ids, decisions = of.replayed(request, spec, lambda number, _, video=video: number == video)
        assert got == ids
        assert length == of.inputs(request)["input_ids"].shape[1] - sum(d.total - d.slots for d in decisions)


# -- bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_positions_of_wide_and_tall_images_in_bfloat16(served, name, tmp_path):
    """More than 256 columns, or rows: a bfloat16 holds no odd number beyond 256."""
    of, cell = served(name), 32 if name == "qwen3-vl" else 28
    shown = [[prompt(picture(2 * cell, 340 * cell, 1))], [prompt(picture(300 * cell, 2 * cell, 2))]]
    options = engine_options(str(of.folder), "uniform(keep=0.3)")
    made = run_engine(
        tmp_path, str(of.folder), *shown, sampling=GREEDY, positions=True, dtype="bfloat16", max_model_len=1024,
        **options,
    )  # fmt: skip
    for (request,), run in zip(shown, made["passes"], strict=True):
        _, (decision,) = of.answer(request, "uniform(keep=0.3)")
        ids, answer = rope_positions(of, of.inputs(request))
        columns = kept_columns(of, of.inputs(request)["input_ids"][0], [decision.anchors])
        steps = [torch.tensor(step) for step in run["positions"]]
        assert ids[1:].amax() > 290
        assert torch.equal(torch.cat(steps, 1)[:, : len(columns)], ids[:, columns])
        assert torch.equal(torch.cat(steps, 1)[:, len(columns) :], (answer + torch.arange(7)).expand(3, -1))


def rope_positions(of: Served, inputs: Any) -> tuple[Tensor, int]:
    """Return transformers' position ids `[3, L]` of an unreduced prompt, and the id of the answer's first token."""
    known = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    ids, delta = of.model.model.get_rope_index(**{name: inputs[name] for name in known if name in inputs})
    return ids[-3:, 0], inputs["input_ids"].shape[1] + int(delta)


def kept_columns(of: Served, ids: Tensor, anchors: list[Tensor]) -> Tensor:
    """Return the columns of a prompt that stay: all but the dropped tokens of its images."""
    image = ids == of.model.config.image_token_id
    first = image & ~image.roll(1)
    stay = ~image
    for start, kept in zip(first.nonzero().flatten().tolist(), anchors, strict=True):
        stay[start + kept] = True
    return stay.nonzero().flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_digits_hold_every_offset(dtype):
    offsets = torch.arange(DIGIT * 256)
    digits = torch.stack([offsets // DIGIT, offsets % DIGIT]).to(dtype).round().long()
    assert torch.equal(digits[0] * DIGIT + digits[1], offsets)
    assert not torch.equal(offsets.to(torch.bfloat16).long(), offsets)  # one column would not do


# -- without an engine ------------------------------------------------------------------------------------------------


def frontend(folder: Any, options: Any) -> Any:
    """Return a function from a prompt to what the frontend makes of it: ids, and per image its data and place."""
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    from tokensieve.vllm import register

    register()
    config = ModelConfig(str(folder), dtype="float32", max_model_len=2048, **options)
    processor = MULTIMODAL_REGISTRY.create_processor(config)

    def process(request: dict[str, Any]) -> Any:
        inputs = ProcessorInputs(
            prompt=processor.info.get_tokenizer().encode(request["prompt"]),
            mm_data_items=processor.info.parse_mm_data(request["multi_modal_data"]),
            hf_processor_mm_kwargs=request.get("mm_processor_kwargs", {}),
        )
        return processor.apply(inputs, TimingContext(enabled=False))

    return process


IMAGES = {"qwen2-vl": 3400, "qwen2.5-vl": 3300, "qwen3-vl": 3300}
CHEAP = ("random(keep=7)", "uniform(keep=7)", "pool(keep=7)", "divprune(keep=7)")


@pytest.mark.parametrize("name", DENSE)
def test_placeholders_of_random_sizes_and_budgets(served, name):
    """10,000 images in all: the number that is promised is that which the method leaves of an image of this size."""
    from PIL import Image

    of, chosen = served(name), random.Random(name)
    patch = of.model.config.vision_config.patch_size
    process = frontend(of.folder, engine_options(str(of.folder), CHEAP[0], allowed=CHEAP[1:]))
    reduced_images = 0
    for start in range(0, IMAGES[name], 10):
        sizes = [(chosen.randint(patch, 30 * patch), chosen.randint(patch, 30 * patch)) for _ in range(10)]
        spec = chosen.choice(CHEAP)
        keep = chosen.choice([chosen.randint(1, 120), round(chosen.uniform(0.01, 1), 3)])
        pictures = [Image.new("RGB", (w, h), (start % 256, i, 0)) for i, (h, w) in enumerate(sizes)]
        made = process(prompt(*pictures, **{KEEP: keep, METHOD: name_of(spec)}))
        method = tokensieve.parse(spec)[0].with_budget(keep)
        whole = of.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
        ids, image = made["prompt_token_ids"], of.model.config.image_token_id
        total = 0
        for place, item, tokens in zip(
            made["mm_placeholders"]["image"], made["mm_kwargs"]["image"], whole, strict=True
        ):
            plan = ImagePlan.read(item[PLAN].data.tolist())
            _, height, width = item["image_grid_thw"].data.tolist()
            assert plan.size == (height, width)
            assert plan.span == tokens == height * width // 4
            assert ids[place.offset : place.offset + place.length] == [image] * plan.rows
            assert plan.rows == rows_left(method, height // 2, width // 2)
            total += plan.rows
            reduced_images += plan.rows < plan.span
        assert ids.count(image) == total
    assert reduced_images > IMAGES[name] / 2


def rows_left(method: Any, height: int, width: int) -> int:
    """Return how many rows a method leaves of an image of random features."""
    from tokensieve.models import TokenLayout

    layout = TokenLayout.grid_of(height, width)
    hashes = [torch.tensor([1])]
    outputs = EncoderOutputs([layout], {}, [], [], hashes, 4, (), None)
    generator = torch.Generator().manual_seed(height * width)
    features = [torch.randn(layout.total, 8, generator=generator)]
    evidence = ConnectorEvidence([layout], features, [], outputs, [0], None, [0], lambda rows: rows)
    (decision,) = decide(method, "image", evidence, [[layout.patches]])
    return len(decision.apply(features[0]))


@pytest.mark.parametrize("name", DENSE)
def test_positions_equal_those_of_the_unreduced_prompt(served, name, monkeypatch):
    """Prompts with several images and videos, and random kept tokens: no other part of the engine runs."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    from tokensieve.vllm import model as reduced
    from tokensieve.vllm.settings import family_of

    of, chosen = served(name), random.Random(name)
    options = engine_options(str(of.folder), "random(keep=7)", from_tokens=9)
    process = frontend(of.folder, options)
    family = family_of(read_config(str(of.folder)))
    kind = getattr(reduced, family.reduced_architecture)
    worker = kind.__new__(kind)
    nn.Module.__init__(worker)
    worker.config = of.model.config
    worker.settings = reduced.EngineSettings(**options["hf_overrides"]["tokensieve"])
    worker.offsets = None
    base = kind.__mro__[2]
    monkeypatch.setattr(base, "embed_input_ids", lambda self, ids, embeddings, *, is_multimodal: None)
    monkeypatch.setattr(base, "forward", lambda self, ids, positions: positions)
    seen = set()
    for number in range(40):
        parts: list[Any] = []
        for _ in range(chosen.randint(1, 5)):
            height, width = (chosen.randint(28, 320) for _ in range(2))
            is_video = chosen.random() < 0.3
            # transformers counts on after a video from its rows and columns only: keep its seconds below them
            parts.append(clip(4, height + 100, width + 100, number) if is_video else picture(height, width, number))
        request = prompt(*parts, **{KEEP: chosen.choice([5, 0.2, 0.6, 1.0])})
        made = process(request)
        order = sorted(
            ((place, item, modality) for modality, places in made["mm_placeholders"].items()
             for place, item in zip(places, made["mm_kwargs"][modality], strict=True)),
            key=lambda entry: entry[0].offset,
        )  # fmt: skip
        features = [MultiModalFeatureSpec(item, modality, "", place) for place, item, modality in order]
        ids, ahead = worker.get_mrope_input_positions(made["prompt_token_ids"], list(reversed(features)))

        # the worker's rows: offsets behind the embeddings, here of random kept tokens
        rows, anchors, layouts = [], [], []
        for place, item, modality in order:
            if modality == "video":
                rows.append(torch.zeros(place.get_num_embeds(), 3 + worker.digits, dtype=torch.bfloat16))
                continue
            plan = ImagePlan.read(item[PLAN].data.tolist())
            layouts.append(family.layout(of.model.config, plan.size))
            anchors.append(torch.tensor(sorted(chosen.sample(range(plan.span), plan.rows))))
            rows.append(worker._with_offsets(torch.zeros(plan.rows, 3, dtype=torch.bfloat16), anchors[-1], layouts[-1]))
            seen.add(plan.rows < plan.span)
        config, prompt_ids = of.model.config, torch.tensor(made["prompt_token_ids"])
        visual = (prompt_ids == config.image_token_id) | (prompt_ids == config.video_token_id)
        worker.embed_input_ids(prompt_ids, rows, is_multimodal=visual)
        ids = worker.forward(None, ids.clone())

        whole = of.inputs(request)
        expected, answer = rope_positions(of, whole)
        columns = kept_columns(of, whole["input_ids"][0], anchors)
        assert torch.equal(whole["input_ids"][0, columns], prompt_ids)
        assert torch.equal(ids, expected[:, columns])
        assert len(prompt_ids) + ahead == answer
        seen |= {modality for *_, modality in order}
    assert seen == {True, False, "image", "video"}
