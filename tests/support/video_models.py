"""Tiny random models of the families that read videos, and prompts with videos, images and both."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from tests.support.laws_tiny import BOS, IMAGE, PAD, VIDEO, VISION_END, VISION_START, _qwen, _qwen3, _qwen25, _text

QWEN = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5")
TIMED = ("qwen3-vl", "qwen3.5")  # a timestamp before each frame
FAMILIES = (*QWEN, "llava-onevision", "llava-next-video", "video-llava")
SIDE = {"llava-onevision": 5, "llava-next-video": 6, "video-llava": 4}  # patches along a frame
TOKENS = {"llava-onevision": 3, "llava-next-video": 3, "video-llava": 4}  # visual tokens along a frame
Kind = Literal["image", "video"]


# -- models ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def build(family: str, attention: str = "sdpa"):
    """A new model with seeded weights: equal arguments, equal weights."""
    cls, config = {
        "qwen2-vl": (Qwen2VLForConditionalGeneration, _qwen2),
        "qwen2.5-vl": (Qwen2_5_VLForConditionalGeneration, _qwen25),
        "qwen3-vl": (Qwen3VLForConditionalGeneration, _qwen3),
        "qwen3.5": (Qwen3_5ForConditionalGeneration, _qwen35),
        "llava-onevision": (LlavaOnevisionForConditionalGeneration, _onevision),
        "llava-next-video": (LlavaNextVideoForConditionalGeneration, _next_video),
        "video-llava": (VideoLlavaForConditionalGeneration, _video_llava),
    }[family]
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = cls._from_config(config(), attn_implementation=attention).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 or "newline" in name:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name or "newline" in name else 0.25)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.1)
    torch.nn.init.zeros_(model.lm_head.weight[VISION_START:])  # never the likeliest: an answer holds no placeholder
    torch.random.set_rng_state(state)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, None
    return model


@cache
def subject(family: str, attention: str = "sdpa"):
    """The model that methods are attached to; every test must leave it detached."""
    return build(family, attention)


@cache
def pristine(family: str, attention: str = "sdpa"):
    """Its twin, which no hook ever touches: what references are computed with."""
    return build(family, attention)


def _qwen2() -> Qwen2VLConfig:
    config = _qwen(Qwen2VLConfig, {}, {})
    vision = {"depth": 4, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 4, "patch_size": 14}
    return Qwen2VLConfig(**{**config.to_dict(), "vision_config": vision})


def _qwen35() -> Qwen3_5Config:
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    heads = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    text = {"head_dim": 16, "partial_rotary_factor": 1.0, "layer_types": kinds, **heads}
    return _qwen(Qwen3_5Config, {"patch_size": 16, "num_position_embeddings": 64}, {"mrope_interleaved": True}, **text)


def _vision(tower: type, side: int):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return tower(**sizes, image_size=side * 14, patch_size=14)


def _onevision() -> LlavaOnevisionConfig:
    side = SIDE["llava-onevision"]
    vision = _vision(SiglipVisionConfig, side)
    vision.vision_use_head = False
    pinpoints = [[side * 14, side * 14], [side * 14, side * 28]]
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**_text()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=pinpoints,
    )


def _next_video() -> LlavaNextVideoConfig:
    side = SIDE["llava-next-video"]
    pinpoints = [[side * 14, side * 14], [side * 14, side * 28]]
    return LlavaNextVideoConfig(
        vision_config=_vision(CLIPVisionConfig, side),
        text_config=LlamaConfig(**_text()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=pinpoints,
    )


def _video_llava() -> VideoLlavaConfig:
    return VideoLlavaConfig(
        vision_config=_vision(CLIPVisionConfig, SIDE["video-llava"]),
        text_config=LlamaConfig(**_text()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )


# -- prompts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shown:
    """An image or a video of a prompt: ``pixels`` as the model takes them, frames, (height, width) of one in tokens.

    ``tokens`` are its placeholders; those of a video that show no patch (newline, [CLS]) are its ``structure``.
    """

    kind: Kind
    pixels: Tensor
    frames: int
    grid: tuple[int, int]
    tokens: int
    structure: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt: token ids with every placeholder expanded, and what it shows, in order."""

    ids: list[int]
    shown: list[Shown] = field(default_factory=list)


def show(family: str, kind: Kind, frames: int, grid: tuple[int, int], g: torch.Generator) -> Shown:
    if family in QWEN:
        patch = 16 if family in TIMED else 14
        pixels = torch.randn(4 * frames * grid[0] * grid[1], 3 * 2 * patch * patch, generator=g)
        return Shown(kind, pixels, frames, grid, frames * grid[0] * grid[1])
    size, tokens = SIDE[family] * 14, TOKENS[family]
    if kind == "video":
        pixels = torch.randn(frames, 3, size, size, generator=g)
        own = frames * tokens * tokens
        structure = {
            "llava-onevision": (own,),
            "llava-next-video": (),
            "video-llava": tuple(frame * (tokens * tokens + 1) for frame in range(frames)),
        }[family]
        return Shown(kind, pixels, frames, (tokens, tokens), own + len(structure), structure)
    if family == "video-llava":
        return Shown(kind, torch.randn(3, size, size, generator=g), 1, (tokens, tokens), tokens * tokens)
    # the base tile and one more, each patch a token, and a newline after each row of the second
    side = SIDE[family]
    return Shown(kind, torch.randn(2, 3, size, size, generator=g), 1, (side, side), side * side + side * (side + 1))


def sample(family: str, parts: tuple, seed: int) -> Sample:
    """``parts`` are numbers of words, "image", or (frames, height, width) of a video; the grid counts on Qwen only."""
    g = torch.Generator().manual_seed(seed)

    def words(n: int) -> list[int]:
        return torch.randint(5, 190, (n,), generator=g).tolist()

    ids, shown = [BOS], []
    for part in parts:
        if isinstance(part, int):
            ids += words(part)
            continue
        frames, *grid = (1, 3, 2) if part == "image" else part
        one = show(family, "image" if part == "image" else "video", frames, tuple(grid), g)
        shown.append(one)
        token = IMAGE if part == "image" else VIDEO
        if family in TIMED and one.kind == "video":
            for _ in range(frames):
                ids += [*words(2), VISION_START, *[token] * (grid[0] * grid[1]), VISION_END]
        else:
            placeholders = [token] * one.tokens
            ids += [VISION_START, *placeholders, VISION_END] if family in QWEN else placeholders
    return Sample(ids, shown)


@cache
def scenario(family: str, name: str) -> list[Sample]:
    """Batches by name; on Qwen the videos of a batch differ in frames and size, elsewhere they cannot."""
    other = (2, 3, 2) if family in QWEN else (4, 2, 3)
    return {
        "single": lambda: [sample(family, (3, (4, 2, 3), 6), 1)],
        "ragged": lambda: [sample(family, (3, (4, 2, 3), 5), 1), sample(family, (6, other, 12), 2)],
        "mixed": lambda: [
            sample(family, (3, "image", 2, (4, 2, 3), 5), 3),
            sample(family, (4, other, 3, (4, 2, 3), 0, "image", 2), 4),
            sample(family, (30,), 5),
            sample(family, (2, "image", 9), 6),
        ],
    }[name]()


def collate(family: str, samples: list[Sample], **more) -> dict[str, Tensor]:
    """Model inputs, left-padded as a processor does it."""
    width = max(len(s.ids) for s in samples)
    ids = torch.tensor([[PAD] * (width - len(s.ids)) + s.ids for s in samples])
    mask = torch.tensor([[0] * (width - len(s.ids)) + [1] * len(s.ids) for s in samples])
    inputs = {"input_ids": ids, "attention_mask": mask}
    images, videos = ([one for s in samples for one in s.shown if one.kind == kind] for kind in ("image", "video"))
    put = torch.cat if family in QWEN else torch.stack
    if images:
        inputs["pixel_values"] = put([one.pixels for one in images])
    if videos:
        inputs["pixel_values_videos"] = put([one.pixels for one in videos])
    if family in QWEN:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        for name, some in (("image_grid_thw", images), ("video_grid_thw", videos)):
            if some:
                inputs[name] = torch.tensor([[one.frames, 2 * one.grid[0], 2 * one.grid[1]] for one in some])
    elif images and family != "video-llava":
        inputs["image_sizes"] = torch.tensor([[SIDE[family] * 14, SIDE[family] * 14]] * len(images))
    return {**inputs, **more}
