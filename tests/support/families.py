"""A tiny random model of every family, and the prompts that the laws are tested with, built from configs alone.

A family is one entry of ``FAMILIES``: its classes, its config, and how one of its images is drawn. Images are drawn as
tensors the way the family's processor would hand them over, with the stretch of the prompt that stands for them:
placeholders and what stands around and between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from tests.support.towers import TinyTowerConfig

PAD, BOS, EOS = 0, 1, 2
BREAK, START, END, VIDEO, IMAGE, VOCABULARY = 195, 196, 197, 198, 199, 200
WORDS = range(5, 190)
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@dataclass(frozen=True, eq=False)
class Image:
    """One visual unit: ``inputs`` as the model takes them, images or patches first, and its ``ids`` in the prompt.

    ``grid`` is (height, width) in visual tokens where they form one; ``newlines`` are tokens that are no patches.
    """

    inputs: dict[str, Tensor]
    ids: list[int]
    grid: tuple[int, int] | None = None
    newlines: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return self.ids.count(IMAGE)


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt: token ids with every placeholder expanded, and its images in order."""

    ids: list[int]
    images: list[Image] = field(default_factory=list)


TokenLayout = tuple[Any, ...]
Draw = Callable[[TokenLayout, torch.Generator], Image]


# -- how images are drawn -------------------------------------------------------------------------------------------


def around(ids: list[int]) -> list[int]:
    return [START, *ids, END]


def square(side: int, tokens: int, marks: bool = False, axes: int = 4, patch: int = 14) -> Draw:
    """Tiles of ``side`` x ``side`` patches and ``tokens`` tokens each; a shape is how many there are, else one.

    ``marks``: with a start and an end token; ``axes`` 5: pixels are [image, tile, 3, H, W].
    """

    def draw(shape: TokenLayout, generator: torch.Generator) -> Image:
        (tiles,), cells = shape or (1,), round(tokens**0.5)
        pixels = torch.randn(*[1] * (axes - 4), tiles, 3, side * patch, side * patch, generator=generator)
        ids = (around if marks else list)([IMAGE] * tokens * tiles)
        return Image({"pixel_values": pixels}, ids, (cells, cells) if tiles == 1 else None)

    return draw


def packed(patch: int) -> Draw:
    """Qwen's packing: (height, width) in tokens of 2x2 patches, each patch one row of two equal frames."""

    def draw(shape: TokenLayout, generator: torch.Generator) -> Image:
        height, width = shape
        frame = torch.randn(4 * height * width, 3, 1, patch, patch, generator=generator)
        inputs = {
            "pixel_values": frame.repeat(1, 1, 2, 1, 1).flatten(1),
            "image_grid_thw": torch.tensor([[1, 2 * height, 2 * width]]),
        }
        return Image(inputs, around([IMAGE] * (height * width)), (height, width))

    return draw


def any_resolution(shape: TokenLayout, generator: torch.Generator) -> Image:
    """LLaVA-NeXT: (height, width) of the picture, its tiles of 4x4 patches, and the mosaic that unpadding leaves.

    The base tile's 16 tokens come first, then the rows of the mosaic, each with a newline token. A picture without
    tiles is its base tile and one newline, as in LLaVA-OneVision's prompts of several images.
    """
    size, (down, across), (height, width) = shape
    pixels = torch.randn(1, 1 + down * across, 3, 56, 56, generator=generator)
    newlines = tuple(16 + row * (width + 1) + width for row in range(height)) if down else (16,)
    tokens = 16 + height * (width + 1) if down else 17
    inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([size])}
    return Image(inputs, [IMAGE] * tokens, None, newlines)


WIDE = ((56, 84), (1, 2), (4, 6))  # unpadded: one column on each side of 4 x 8
TALL = ((100, 48), (2, 1), (8, 4))
LARGE = ((112, 112), (2, 2), (8, 8))
ALONE = ((40, 56), (0, 0), (0, 0))
# a mosaic of more than 16 tokens is resampled to about as many, bilinearly
RESAMPLED = (((56, 84), (1, 2), (3, 4)), ((100, 48), (2, 1), (5, 2)), ((112, 112), (2, 2), (4, 4)))
ONE_TILE = {"vision_aspect_ratio": "anyres_max_1"}


def pixtral(merge: int) -> Draw:
    """Any (height, width) in tokens of ``merge`` x ``merge`` patches; a mark ends every row, another the last."""

    def draw(shape: TokenLayout, generator: torch.Generator) -> Image:
        (height, width), cell = shape, 14 * merge
        pixels = torch.randn(1, 3, cell * height, cell * width, generator=generator)
        ids = ([IMAGE] * width + [BREAK]) * height
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[cell * height, cell * width]])}
        return Image(inputs, [*ids[:-1], END], (height, width))

    return draw


def tile(shape: TokenLayout, generator: torch.Generator) -> Image:
    """Idefics3: a tile of 8x8 patches, 16 tokens after a mark."""
    pixels = torch.randn(1, 3, 112, 112, generator=generator)
    inputs = {"pixel_values": pixels, "pixel_attention_mask": torch.ones(1, 112, 112, dtype=torch.long)}
    return Image(inputs, [START, BREAK, *[IMAGE] * 16], (4, 4))


# -- configs --------------------------------------------------------------------------------------------------------


def vision(model_type: str = "", side: int = 5, **more: Any) -> dict[str, Any]:
    """A tower for pictures of ``side`` x ``side`` patches."""
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    named = {"model_type": model_type} if model_type else {}
    return shared | named | {"image_size": 14 * side, "patch_size": 14} | more


def text(model_type: str = "", **more: Any) -> dict[str, Any]:
    shared = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    shared |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
    shared |= {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return shared | ({"model_type": model_type} if model_type else {}) | more


def mrope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], **more}}


def packing(**more: Any) -> dict[str, Any]:
    """A tower of packed patches."""
    shared = {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64}
    return shared | {"spatial_merge_size": 2, "temporal_patch_size": 2} | more


CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
COHERE = {"logit_scale": 1.0, "sliding_window": 20, "layer_types": GEMMA3_LAYERS}
VISION_MARKS = {"vision_start_token_id": START, "vision_end_token_id": END}
GLM_MARKS = {"image_start_token_id": START, "image_end_token_id": END}
PINPOINTS = {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]}


@dataclass(frozen=True, eq=False)
class Family:
    """One row of the matrix.

    Attributes:
        name: e.g. "llava-next".
        classes: what its transformers classes start with.
        config: arguments of its config class.
        draw: one image of a shape.
        shapes: three shapes, of the images of the prompts in turn; of equal images: any.
        several: shapes of images that share a prompt, where that changes them.
        types: name of the input that marks image tokens with 1, if the model takes one.
        axes: 1 or 3 (M-RoPE) position axes.
        first_position: PaliGemma counts from 1.
        bidirectional: which tokens of a prompt see what follows them: none, those of an "image", or the "prompt".
        stacked: whether pixels come as [sample, image, ...], images short of the most being zero.
        counts: name of the input that says how many images each sample has.
    """

    name: str
    classes: str
    config: dict[str, Any]
    draw: Draw
    shapes: tuple[TokenLayout, ...] = ((), (), ())
    several: tuple[TokenLayout, ...] = ()
    types: str | None = None
    axes: int = 1
    first_position: int = 0
    bidirectional: str = ""
    stacked: bool = False
    counts: str | None = None


GRIDS = ((4, 4), (3, 5), (2, 6))
SIZES = (WIDE, TALL, LARGE)
QWEN = {"shapes": GRIDS, "types": "mm_token_type_ids", "axes": 3}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llava-clip",
            "Llava",
            {
                "vision_config": vision(CLIP),
                "text_config": text("llama"),
                "vision_feature_layer": -2,
                "vision_feature_select_strategy": "default",
            },
            square(5, 25),
        ),
        Family(
            "llava-siglip",
            "Llava",
            {
                "vision_config": vision(SIGLIP),
                "text_config": text("llama"),
                "vision_feature_layer": -2,
                "vision_feature_select_strategy": "full",
            },
            square(5, 25),
        ),
        Family(
            "vipllava",
            "VipLlava",
            {"vision_config": vision(CLIP), "text_config": text("llama"), "vision_feature_layer": [-2, 1, 3]},
            square(5, 25),
        ),
        Family(
            "llava-next",
            "LlavaNext",
            {"vision_config": vision(CLIP, 4), "text_config": text("llama"), **PINPOINTS},
            any_resolution,
            SIZES,
        ),
        Family(
            "llava-onevision",
            "LlavaOnevision",
            {"vision_config": vision(SIGLIP, 4), "text_config": text("qwen2"), **PINPOINTS},
            any_resolution,
            SIZES,
            several=(ALONE,),
            counts="batch_num_images",
        ),
        Family(
            "llava-onevision-resampled",
            "LlavaOnevision",
            {"vision_config": vision(SIGLIP, 4), "text_config": text("qwen2"), **PINPOINTS, **ONE_TILE},
            any_resolution,
            RESAMPLED,
            several=(ALONE,),
            counts="batch_num_images",
        ),
        Family(
            "llava-next-video",
            "LlavaNextVideo",
            {"vision_config": vision(CLIP, 4), "text_config": text("llama"), **PINPOINTS},
            any_resolution,
            SIZES,
        ),
        Family(
            "video-llava",
            "VideoLlava",
            {"vision_config": vision(CLIP), "text_config": text("llama")},
            square(5, 25),
        ),
        Family(
            "qwen2-vl",
            "Qwen2VL",
            {
                "vision_config": {"depth": 4, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 4},
                "text_config": text(**mrope()),
                **VISION_MARKS,
            },
            packed(14),
            **QWEN,
        ),
        Family(
            "qwen2.5-vl",
            "Qwen2_5_VL",
            {
                "vision_config": packing(patch_size=14, window_size=56, fullatt_block_indexes=[1, 2, 3]),
                "text_config": text(**mrope()),
                **VISION_MARKS,
            },
            packed(14),
            **QWEN,
        ),
        Family(
            "qwen3-vl",
            "Qwen3VL",
            {
                "vision_config": packing(deepstack_visual_indexes=[0, 1, 2], num_position_embeddings=64),
                "text_config": text(head_dim=16, **mrope(mrope_interleaved=True)),
                **VISION_MARKS,
            },
            packed(16),
            **QWEN,
        ),
        Family(
            "qwen3.5",
            "Qwen3_5",
            {
                "vision_config": packing(num_position_embeddings=64),
                "text_config": text(
                    head_dim=16,
                    partial_rotary_factor=1.0,
                    layer_types=["linear_attention", "full_attention", "linear_attention"],
                    linear_key_head_dim=8,
                    linear_value_head_dim=8,
                    linear_num_key_heads=2,
                    linear_num_value_heads=4,
                    **mrope(mrope_interleaved=True),
                ),
                **VISION_MARKS,
            },
            packed(16),
            **QWEN,
        ),
        Family(
            "internvl",
            "InternVL",
            {"vision_config": vision("", 8), "text_config": text("qwen2"), "image_seq_length": 16},
            square(8, 16, marks=True),
            ((1,), (3,), (2,)),
        ),
        Family(
            "idefics3",
            "Idefics3",
            {"vision_config": vision("", 8), "text_config": text("llama"), "scale_factor": 2},
            tile,
            stacked=True,
        ),
        Family(
            "smolvlm",
            "SmolVLM",
            {"vision_config": vision("", 8), "text_config": text("llama"), "scale_factor": 2},
            tile,
            stacked=True,
        ),
        Family(
            "gemma3",
            "Gemma3",
            {
                "vision_config": vision(SIGLIP, 8),
                "text_config": text(
                    "gemma3_text",
                    head_dim=16,
                    query_pre_attn_scalar=16,
                    sliding_window=20,
                    layer_types=GEMMA3_LAYERS,
                ),
                "mm_tokens_per_image": 16,
                "boi_token_index": START,
                "eoi_token_index": END,
            },
            square(8, 16, marks=True),
            types="token_type_ids",
            bidirectional="image",
        ),
        Family(
            "paligemma",
            "PaliGemma",
            {
                "vision_config": vision(SIGLIP),
                "text_config": text("gemma", head_dim=16),
                "projection_dim": 64,
                "hidden_size": 64,
                "vocab_size": VOCABULARY,
            },
            square(5, 25),
            types="token_type_ids",
            first_position=1,
            bidirectional="prompt",
        ),
        Family(
            "mistral3",
            "Mistral3",
            {
                "vision_config": vision("pixtral", 16, head_dim=8),
                "text_config": text("mistral", head_dim=16, sliding_window=None),
                "spatial_merge_size": 2,
            },
            pixtral(merge=2),
            GRIDS,
        ),
        Family(
            "pixtral",
            "Llava",
            {
                "vision_config": vision("pixtral", 16, head_dim=8),
                "text_config": text("mistral", head_dim=16, sliding_window=None),
                "vision_feature_layer": -1,
                "vision_feature_select_strategy": "full",
            },
            pixtral(merge=1),
            GRIDS,
        ),
        Family(
            "aya-vision",
            "AyaVision",
            {"vision_config": vision(SIGLIP, 8), "text_config": text("cohere2", **COHERE)},
            square(8, 16, marks=True),
        ),
        Family(
            "ovis2",
            "Ovis2",
            {
                "vision_config": {**vision("", 8), "hidden_stride": 2, "vocab_size": 40},
                "text_config": text("qwen2"),
                "visual_indicator_token_ids": [190, 191, 192, START, END],
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
            },
            square(8, 16, marks=True),
        ),
        Family(
            "cohere2-vision",
            "Cohere2Vision",
            {
                "vision_config": vision(SIGLIP, 8),
                "text_config": text("cohere2", **COHERE),
                "alignment_intermediate_size": 64,
            },
            square(8, 16, marks=True),
        ),
        Family(
            "fast-vlm",
            "FastVlm",
            {"vision_config": TinyTowerConfig(convolutional=True), "text_config": text("qwen2")},
            square(5, 25),
        ),
        Family(
            "perception-lm",
            "PerceptionLM",
            {
                "vision_config": TinyTowerConfig(),
                "text_config": text("llama"),
                "projector_pooling_ratio": 2,
            },
            square(8, 16, axes=5),
            ((2,),),
        ),
        Family(
            "glm4v",
            "Glm4v",
            {
                "vision_config": packing(image_size=112, patch_size=14),
                "text_config": text(**mrope()),
                **GLM_MARKS,
            },
            packed(14),
            **QWEN,
        ),
        Family(  # of no family that Tokensieve knows
            "lighton-ocr",
            "LightOnOcr",
            {"vision_config": vision("pixtral", 16, head_dim=8), "text_config": text("qwen3", head_dim=16)},
            pixtral(merge=2),
            GRIDS,
        ),
    )
}


def towered(like: str, name: str, tower: Any, draw: Draw, **config: Any) -> Family:
    """A family of the matrix with another tower."""
    return replace(
        FAMILIES[like], name=name, config=FAMILIES[like].config | {"vision_config": tower} | config, draw=draw
    )


def timm(architecture: str, width: int, **arguments: Any) -> dict[str, Any]:
    """A real tower of timm's, whose rows are ``width`` wide."""
    named = {"model_type": "timm_wrapper", "architecture": architecture, "do_pooling": False}
    return {**named, "hidden_size": width, "model_args": arguments}


def towers() -> list[Family]:
    """Stand-in without [CLS], and the real ones where timm is installed."""
    tiles, bare = square(8, 16, axes=5), {"vision_use_cls_token": False}
    found = [towered("perception-lm", "perception-lm-no-cls", TinyTowerConfig(class_token=False), tiles, **bare)]
    if find_spec("timm") is not None:
        large, gigantic = "vit_pe_lang_large_patch14_448", "vit_pe_lang_gigantic_patch14_448"
        sizes = {"embed_dim": 32, "depth": 4, "num_heads": 4, "img_size": (112, 112), "ref_feat_shape": (8, 8)}
        shape = {"embed_dims": (8, 8, 8, 64, 64), "layers": (1, 1, 1, 1, 3), "inference_mode": True}
        found += [
            towered("perception-lm", large, timm(large, 32, global_pool="", **sizes), tiles),
            towered("perception-lm", gigantic, timm(gigantic, 32, global_pool="", **sizes), tiles, **bare),
            towered("fast-vlm", "fastvit_mci3", timm("fastvit_mci3", 128, **shape), square(4, 16, patch=64)),
        ]
    return found


FAMILIES |= {family.name: family for family in towers()}


# -- models ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def build(name: str, attention: str = "sdpa") -> Any:
    """A new model with seeded weights: equal arguments, equal weights."""
    family = FAMILIES[name]
    config_class = getattr(transformers, f"{family.classes}Config")
    model_class = getattr(transformers, f"{family.classes}ForConditionalGeneration")
    config = config_class(**family.config, image_token_id=IMAGE, video_token_id=VIDEO, tie_word_embeddings=False)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=attention).eval()
    for key, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in key else 0.25)
        elif "bias" in key:
            torch.nn.init.normal_(weight, std=0.1)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    torch.nn.init.zeros_(model.lm_head.weight[190:])  # never the likeliest: an answer holds no placeholder
    torch.random.set_rng_state(state)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, None
    return model


@cache
def subject(name: str, attention: str = "sdpa") -> Any:
    """The model that methods are attached to; every test must leave it detached."""
    model = build(name, attention)
    model.generate(**collate(name, scenario(name, "single")), max_new_tokens=1)  # transformers' own lazy hooks
    return model


@cache
def pristine(name: str, attention: str = "sdpa") -> Any:
    """Its twin, which no hook ever touches: what references are computed with."""
    return build(name, attention)


# -- prompts --------------------------------------------------------------------------------------------------------


def sample(name: str, words: tuple[int, ...], shapes: tuple[int, ...], seed: int) -> Sample:
    """``words[0]`` words, an image of ``FAMILIES[name].shapes[shapes[0]]``, ``words[1]`` words, … words at the end."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(seed)

    def say(count: int) -> list[int]:
        return torch.randint(WORDS.start, WORDS.stop, (count,), generator=generator).tolist()

    available = family.several if family.several and len(shapes) > 1 else family.shapes
    images = [family.draw(available[shape % len(available)], generator) for shape in shapes]
    ids = [BOS, *say(words[0])]
    for image, count in zip(images, words[1:], strict=True):
        ids += [*image.ids, *say(count)]
    return Sample(ids, images)


@cache
def scenario(name: str, batch: str) -> list[Sample]:
    """Batches by name: "single" is one prompt; "ragged" three of different lengths, one with two images."""
    return {
        "single": lambda: [sample(name, (3, 6), (0,), 1)],
        "ragged": lambda: [
            sample(name, (3, 5), (0,), 1),
            sample(name, (4, 2, 7), (1, 2), 2),
            sample(name, (9, 3), (2,), 3),
        ],
    }[batch]()


def together(tensors: list[Tensor]) -> Tensor:
    """Concatenated along the first axis, the others filled up with zeros."""
    sizes = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        room = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
        filled.append(pad(tensor, [n for extra in reversed(room) for n in (0, extra)]))
    return torch.cat(filled)


def pictures(name: str, samples: list[Sample]) -> dict[str, Tensor]:
    """All that the vision tower takes, as the processor puts a batch together."""
    family = FAMILIES[name]
    rows = [[image.inputs for image in s.images] for s in samples]
    out = {}
    for key in rows[0][0]:
        per_sample = [together([inputs[key] for inputs in row]) for row in rows if row]
        out[key] = together([x[None] for x in per_sample] if family.stacked else per_sample)
    if family.counts:
        out[family.counts] = torch.tensor([len(row) for row in rows])
    return out


def collate(name: str, samples: list[Sample], **more: Any) -> dict[str, Tensor]:
    """Model inputs, left-padded as a processor does it."""
    family, width = FAMILIES[name], max(len(s.ids) for s in samples)
    ids = torch.tensor([[PAD] * (width - len(s.ids)) + s.ids for s in samples])
    mask = torch.tensor([[0] * (width - len(s.ids)) + [1] * len(s.ids) for s in samples])
    inputs = {"input_ids": ids, "attention_mask": mask, **pictures(name, samples)}
    if family.types:  # PaliGemma's says what belongs to the answer: in a prompt, nothing
        inputs[family.types] = (ids == IMAGE).long() * (family.bidirectional != "prompt")
    return {**inputs, **more}


def footprint(model: Any) -> list:
    """All that attaching could leave behind: hooks, and each module's attributes, weights and config by identity."""
    memory = ("rope_deltas", "_previous_max_cache_length")  # what transformers itself remembers of the last call
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    out = []
    for name, module in model.named_modules():
        own = {key: id(value) for key, value in vars(module).items() if key not in memory}
        parts = (module._parameters, module._modules, module._buffers)
        listening = [len(getattr(module, hook)) for hook in hooks]
        out.append((name, own, listening, [(key, id(value)) for part in parts for key, value in part.items()]))
    return out
