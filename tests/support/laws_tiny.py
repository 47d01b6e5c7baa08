"""Tiny random models of four families, and the prompts that the laws are tested with."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

PAD, BOS, EOS = 0, 1, 2
VISION_START, VISION_END, VIDEO, IMAGE, VOCABULARY = 196, 197, 198, 199, 200
FAMILIES = ("llava-clip", "llava-siglip", "qwen2.5-vl", "qwen3-vl")
LLAVA, QWEN = FAMILIES[:2], FAMILIES[2:]
SIDE = 5  # a LLaVA image is SIDE x SIDE patches
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


# -- models ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def build(family: str, attention: str = "sdpa"):
    """A new model with seeded weights: equal arguments, equal weights."""
    cls, config = {
        "llava-clip": (LlavaForConditionalGeneration, lambda: _llava(CLIPVisionConfig, "default")),
        "llava-siglip": (LlavaForConditionalGeneration, lambda: _llava(SiglipVisionConfig, "full")),
        "qwen2.5-vl": (Qwen2_5_VLForConditionalGeneration, _qwen25),
        "qwen3-vl": (Qwen3VLForConditionalGeneration, _qwen3),
    }[family]
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = cls._from_config(config(), attn_implementation=attention).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 0.25)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.1)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    torch.nn.init.zeros_(model.lm_head.weight[VISION_START:])  # never the likeliest: an answer holds no placeholder
    torch.random.set_rng_state(state)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, None
    return model


@cache
def subject(family: str, attention: str = "sdpa"):
    """The model that methods are attached to; every test must leave it detached."""
    model = build(family, attention)
    model.generate(**collate(family, scenario(family, "single")), max_new_tokens=1)  # transformers' own lazy hooks
    return model


@cache
def pristine(family: str, attention: str = "sdpa"):
    """Its twin, which no hook ever touches: what references are computed with."""
    return build(family, attention)


def _text(**more):
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **more,
    }


def _llava(tower: type, strategy: str) -> LlavaConfig:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlavaConfig(
        vision_config=tower(**vision, image_size=SIDE * 14, patch_size=14),
        text_config=LlamaConfig(**_text()),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
    )


def _qwen(config: type, vision: dict, rope: dict, **text):
    shared = {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64}
    shared |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], **rope}
    return config(
        text_config=_text(rope_parameters=rope, **text),
        vision_config=shared | vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def _qwen25() -> Qwen2_5_VLConfig:
    vision = {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1, 2, 3]}
    return _qwen(Qwen2_5_VLConfig, vision, {})


def _qwen3() -> Qwen3VLConfig:
    vision = {"patch_size": 16, "deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 64}
    return _qwen(Qwen3VLConfig, vision, {"mrope_interleaved": True}, head_dim=16)


# -- prompts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Image:
    """One image: ``pixels`` as the tower takes them, ``grid`` (height, width) in visual tokens."""

    pixels: Tensor
    grid: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt: token ids with every placeholder expanded, and its images in order."""

    ids: list[int]
    images: list[Image] = field(default_factory=list)


def image(family: str, grid: tuple[int, int], generator: torch.Generator) -> Image:
    if family in LLAVA:
        return Image(torch.randn(3, SIDE * 14, SIDE * 14, generator=generator), (SIDE, SIDE))
    patch = 14 if family == "qwen2.5-vl" else 16
    frame = torch.randn(4 * grid[0] * grid[1], 3, 1, patch, patch, generator=generator)
    return Image(frame.repeat(1, 1, 2, 1, 1).flatten(1), grid)  # a still image is two equal frames


def sample(family: str, text: tuple[int, ...], grids: tuple[tuple[int, int], ...], seed: int) -> Sample:
    """``text[0]`` words, an image, ``text[1]`` words, an image, … and words at the end."""
    g = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(5, 190, (n,), generator=g).tolist()

    images = [image(family, grid, g) for grid in grids]
    ids = [BOS, *words(text[0])]
    for shown, n in zip(images, text[1:], strict=True):
        placeholders = [IMAGE] * shown.tokens
        ids += placeholders if family in LLAVA else [VISION_START, *placeholders, VISION_END]
        ids += words(n)
    return Sample(ids, images)


@cache
def scenario(family: str, name: str) -> list[Sample]:
    """Batches by name; on Qwen the images of "ragged" and "mixed" differ in size."""

    def one(*args):
        return sample(family, *args)

    return {
        "single": lambda: [one((3, 6), ((4, 4),), 1)],
        "ragged": lambda: [one((3, 5), ((4, 4),), 1), one((6, 12), ((3, 5),), 2), one((2, 2), ((2, 6),), 3)],
        "two-images": lambda: [one((3, 2, 5), ((4, 4), (2, 6)), 4)],
        "mixed": lambda: [
            one((3, 1, 5), ((4, 4), (3, 5)), 4),
            one((4, 9), ((2, 6),), 5),
            one((30,), (), 6),
            one((2, 0, 3, 4), ((2, 6), (4, 4), (3, 5)), 7),
        ],
    }[name]()


def collate(family: str, samples: list[Sample], **more) -> dict[str, Tensor]:
    """Model inputs, left-padded as a processor does it."""
    width = max(len(s.ids) for s in samples)
    ids = torch.tensor([[PAD] * (width - len(s.ids)) + s.ids for s in samples])
    mask = torch.tensor([[0] * (width - len(s.ids)) + [1] * len(s.ids) for s in samples])
    images = [shown for s in samples for shown in s.images]
    inputs = {"input_ids": ids, "attention_mask": mask}
    if images and family in LLAVA:
        inputs["pixel_values"] = torch.stack([shown.pixels for shown in images])
    elif images:
        inputs["pixel_values"] = torch.cat([shown.pixels for shown in images])
        inputs["image_grid_thw"] = torch.tensor([[1, 2 * h, 2 * w] for h, w in (shown.grid for shown in images)])
    if family in QWEN:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return {**inputs, **more}


def hooks(model) -> int:
    """How many hooks live on a model and all its modules."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def footprint(model) -> list:
    """All that attaching could leave behind: hooks, and each module's attributes, weights and config by identity."""
    memory = ("rope_deltas", "_previous_max_cache_length")  # what transformers itself remembers of the last call
    out: list = [hooks(model)]
    for name, module in model.named_modules():
        own = {k: id(v) for k, v in vars(module).items() if k not in memory}
        parts = (module._parameters, module._modules, module._buffers)
        out.append((name, own, [(k, id(v)) for part in parts for k, v in part.items()]))
    return out
