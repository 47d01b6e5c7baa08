"""The layout of LLaVA-NeXT's and LLaVA-OneVision's images from their size alone, as a serving engine needs it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlavaNextConfig, LlavaOnevisionConfig, LlavaOnevisionProcessor

from tests.support import models, processors
from tokensieve.engine.connector.decide import ConnectorEvidence, decide
from tokensieve.engine.handoff import EncoderOutputs
from tokensieve.methods import parse
from tokensieve.models import EncodeCall, TokenLayout, family_of
from tokensieve.models.any_resolution import layout_of_size
from tokensieve.vllm.families import FAMILIES as SERVED
from tokensieve.vllm.plan import ImagePlan
from tokensieve.vllm.settings import Choice

TINY = {"llava-next": None, "llava-onevision": 9, "llava-onevision-resampled": 1}  # the tiles that are not resampled
CONFIGS = {"llava_next": LlavaNextConfig, "llava_onevision": LlavaOnevisionConfig}
METHODS = ("random", "uniform", "pool", "divprune", "hired", "visionzip")
SIZES, DECISIONS = 5_000, 1_500  # per family


def sizes(count: int, longest: int, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Yield sizes of all shapes: plain, thin lines, and those around the borders of tiles."""
    draw = random.Random(seed)
    for number in range(count):
        height, width = draw.randint(1, longest), draw.randint(1, longest)
        if number % 4 == 1:
            height = draw.randint(1, 9)
        elif number % 4 == 2:
            width = draw.randint(1, 9)
        elif number % 4 == 3:
            height, width = (max(1, 14 * draw.randint(1, longest // 14) + draw.randint(-1, 1)) for _ in range(2))
        yield height, width


def same(first: TokenLayout, second: TokenLayout) -> bool:
    tensors = [[getattr(one, name) for name in ("units", "line", "patch_index", "tile")] for one in (first, second)]
    plain = [(one.total, one.views, one.tiles, one.mapped, one.video) for one in (first, second)]
    return plain[0] == plain[1] and all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(*tensors, strict=True)
    )


@pytest.mark.parametrize("name", TINY)
def test_a_layout_from_the_size_is_that_of_the_models_own_packing(name):
    model = models.unhooked(name)
    family, pixels = family_of(model), torch.zeros(1, 3, 56, 56)
    layouts = []
    for size in sizes(400, 500):
        inputs = {"image_sizes": torch.tensor([size]), "pixel_values": pixels[None]}
        (packed,) = family.layouts(model, EncodeCall(inputs, encoder_inputs={"pixel_values": pixels}))
        layouts.append(layout_of_size(size, model.config.image_grid_pinpoints, 56, 4, TINY[name]))
        assert same(packed, layouts[-1]), size
    assert {layout.mapped for layout in layouts} == {True, name != "llava-onevision-resampled"}
    assert {len(layout.views) for layout in layouts} == {1, 2}, "thin lines have no mosaic"


@cache
def config_of(model_type: str) -> Any:
    return CONFIGS[model_type]()


def processor_of(config: Any) -> Any:
    """Return a processor with the sizes of a published model."""
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    like_next = processors.processor("llava-next")
    size, pinpoints = {"shortest_edge": side}, config.image_grid_pinpoints
    images = type(like_next.image_processor)(size=size, image_grid_pinpoints=pinpoints)
    if config.model_type == "llava_next":
        return type(like_next)(images, like_next.tokenizer, patch, "default", num_additional_image_tokens=1)

    class ImagesOnly(LlavaOnevisionProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
            return type(argument)  # the class of video processors needs torchvision

    return ImagesOnly(images, like_next.tokenizer, None, (side // patch) ** 2, "full")


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_layout_has_as_many_tokens_as_the_processor_writes(model_type):
    config = config_of(model_type)
    (family,) = (family for family in SERVED if model_type in family.model_types)
    drawn = list(sizes(SIZES, 3000))
    written = processor_of(config)._get_num_multimodal_tokens(image_sizes=drawn).num_image_tokens
    for size, count in zip(drawn, written, strict=True):
        assert family.layout(config, size).total == count, size


def evidence_of(layout: TokenLayout, seed: int) -> ConnectorEvidence:
    """Return random evidence about one image."""
    draw, count = torch.Generator().manual_seed(seed), layout.patches
    rows = [torch.rand(count, 8, generator=draw)]
    by_layer = {name: {n: [torch.rand(count, generator=draw)] for n in range(4)} for name in ("cls_attention",)}
    by_layer |= {"encoder_keys": {n: [torch.rand(count, 2, 4, generator=draw)] for n in range(4)}}
    outputs = EncoderOutputs([layout], by_layer, rows, [], [torch.tensor([seed])], 4, (), None)
    return ConnectorEvidence([layout], rows, rows, outputs, [0], None, [0], lambda rows: rows)


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision"])
def test_an_image_gets_as_many_placeholders_as_its_method_leaves_rows(name):
    config = deepcopy(models.unhooked(name).config)
    config.image_grid_pinpoints += [[224, 224], [56, 224]]  # 16 tiles: OneVision resamples above 9
    (family,) = (family for family in SERVED if config.model_type in family.model_types)
    draw, seen = random.Random(1), set()
    for number, size in enumerate(sizes(DECISIONS, 600)):
        layout = family.layout(config, size)
        budget = draw.choice([draw.randint(1, 100), draw.uniform(0.01, 1)])
        (method,) = parse(f"{METHODS[number % len(METHODS)]}(keep={budget})")
        plan = ImagePlan.of(Choice(0, method), family.parts(layout), layout.total, size, from_tokens=0)
        if not plan.reduces:
            assert plan.rows == layout.total
            continue
        if not layout.mapped and method.needs.reads_attention:  # refused
            continue
        served = family.layouts(config, [size], {"pixel_values": [[None] * (layout.tiles + 1)]})[0]
        assert same(layout, served)
        evidence = evidence_of(replace(layout, separators="none"), number)
        (decision,) = decide(method.with_budget(plan.budget), "image", evidence, [[layout.patches]])
        assert decision.slots == plan.rows, (size, str(method))
        seen.add((method.info.name, len(layout.views), layout.mapped))
    assert seen >= {(name, views, True) for name in METHODS for views in (1, 2)}
    assert ((METHODS[0], 2, False) in seen) == (name == "llava-onevision")
