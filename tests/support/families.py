"""A tiny model of every family, declared: its classes, its config, and how one of its images is drawn.

Images are drawn as tensors in the layout that the family's processor returns, with their ids in the prompt:
placeholders, and the tokens around and between them. ``FAMILIES`` are the rows of the family matrix; ``VARIANTS`` are
deeper LLMs and models for videos.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from transformers import VideoLlavaModel, VipLlavaConfig

from tests.support.towers import TinyTowerConfig
from tokensieve.models.versions import FIRST_RELEASE

PAD, BOS, EOS = 0, 1, 2
BREAK, START, END, VIDEO, IMAGE, VOCABULARY = 195, 196, 197, 198, 199, 200
WORDS = range(5, 190)


@dataclass(frozen=True, eq=False)
class Image:
    """One image or video of a prompt.

    Attributes:
        inputs: tensors by the name of the model's input; pixels or patches first.
        ids: its part of the prompt.
        grid: (height, width) in visual tokens, of one frame if it is a video; ``None`` if they form none.
        newlines: tokens that show no patch: newlines, or the [CLS] rows of a video's frames.
        frames: of a video; ``None``: a still image.
    """

    inputs: dict[str, Tensor]
    ids: list[int]
    grid: tuple[int, int] | None = None
    newlines: tuple[int, ...] = ()
    frames: int | None = None

    @property
    def pixels(self) -> Tensor:
        return next(iter(self.inputs.values()))

    @property
    def tokens(self) -> int:
        return sum(i in (IMAGE, VIDEO) for i in self.ids)


@dataclass(frozen=True, eq=False)
class Sample:
    """One prompt: token ids with every placeholder expanded, and its images and videos in order."""

    ids: list[int]
    images: list[Image] = field(default_factory=list)


Shape = tuple[Any, ...]
Draw = Callable[[Shape, torch.Generator], Image]


# -- how images are drawn -------------------------------------------------------------------------------------------


def around(ids: list[int]) -> list[int]:
    return [START, *ids, END]


def square(
    side: int, tokens: int, marks: bool = False, axes: int = 4, patch: int = 14, name: str = "pixel_values"
) -> Draw:
    """Tiles of ``side`` x ``side`` patches and ``tokens`` tokens each; a shape is how many there are, else one.

    ``marks``: with a start and an end token; ``axes`` 5: pixels are [image, tile, 3, H, W].
    """

    def draw(shape: Shape, generator: torch.Generator) -> Image:
        (tiles,), cells = shape or (1,), round(tokens**0.5)
        pixels = torch.randn(*[1] * (axes - 4), tiles, 3, side * patch, side * patch, generator=generator)
        ids = (around if marks else list)([IMAGE] * tokens * tiles)
        return Image({name: pixels}, ids, (cells, cells) if tiles == 1 else None)

    return draw


def words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(WORDS.start, WORDS.stop, (count,), generator=generator).tolist()


def packed(patch: int, timestamps: bool = False) -> Draw:
    """Qwen's packing: (height, width) in tokens of 2x2 patches, each patch one row of two equal frames.

    A shape (frames, height, width) is a video; ``timestamps``: words stand before each of its frames.
    """

    def draw(shape: Shape, generator: torch.Generator) -> Image:
        *frames, height, width = shape
        if frames:
            pixels = torch.randn(4 * frames[0] * height * width, 3 * 2 * patch * patch, generator=generator)
            sizes, ids = torch.tensor([[frames[0], 2 * height, 2 * width]]), [VIDEO] * (height * width)
            stamped = [i for _ in range(frames[0]) for i in [*words(2, generator), *around(ids)]]
            ids = stamped if timestamps else around(ids * frames[0])
            inputs = {"pixel_values_videos": pixels, "video_grid_thw": sizes}
            return Image(inputs, ids, (height, width), frames=frames[0])
        frame = torch.randn(4 * height * width, 3, 1, patch, patch, generator=generator)
        sizes = torch.tensor([[1, 2 * height, 2 * width]])
        inputs = {"pixel_values": frame.repeat(1, 1, 2, 1, 1).flatten(1), "image_grid_thw": sizes}
        return Image(inputs, around([IMAGE] * (height * width)), (height, width))

    return draw


def framed(side: int, cells: int, newline: bool = False, cls: bool = False) -> Draw:
    """Frames of ``side`` x ``side`` patches and ``cells`` x ``cells`` tokens; a shape is (frames, …), else one image.

    ``newline``: a token ends a video; ``cls``: a token begins each frame, and images are single tiles. Other images are
    a whole tile and one more, every patch a token, with a newline after each row of the second.
    """
    size = 14 * side

    def draw(shape: Shape, generator: torch.Generator) -> Image:
        if shape:
            tokens = shape[0] * cells * cells
            extra = tuple(frame * (cells * cells + 1) for frame in range(shape[0])) if cls else (tokens,) * newline
            inputs = {"pixel_values_videos": torch.randn(1, shape[0], 3, size, size, generator=generator)}
            return Image(inputs, [VIDEO] * (tokens + len(extra)), (cells, cells), extra, shape[0])
        if cls:
            pixels = torch.randn(1, 3, size, size, generator=generator)
            return Image({VIDEO_LLAVA_PIXELS: pixels}, [IMAGE] * (cells * cells), (cells, cells))
        pixels = torch.randn(1, 2, 3, size, size, generator=generator)
        newlines = tuple(side * side + row * (side + 1) + side for row in range(side))
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[size, size]])}
        return Image(inputs, [IMAGE] * (side * side + side * (side + 1)), (side, side), newlines)

    return draw


def any_resolution(shape: Shape, generator: torch.Generator) -> Image:
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

    def draw(shape: Shape, generator: torch.Generator) -> Image:
        (height, width), cell = shape, 14 * merge
        pixels = torch.randn(1, 3, cell * height, cell * width, generator=generator)
        ids = ([IMAGE] * width + [BREAK]) * height
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[cell * height, cell * width]])}
        return Image(inputs, [*ids[:-1], END], (height, width))

    return draw


def tile(shape: Shape, generator: torch.Generator) -> Image:
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
        classes: the beginning of its transformers classes' names.
        vision, llm: configs of the vision encoder and of the language model.
        draw: draws one image of a shape.
        shapes: three shapes, of the images of the prompts in turn; of equal images: any.
        more: other arguments of its config class.
        several: shapes of images that share a prompt, where that changes them.
        types: name of the input that marks image tokens with 1, if the model takes one.
        axes: 1 or 3 (M-RoPE) position axes.
        first_position: PaliGemma counts from 1.
        bidirectional: tokens of a prompt that attend to later ones: none, those of an "image", or the "prompt".
        stacked: whether pixels come as [sample, image, ...], images short of the most being zero.
        counts: name of the input with the number of images of each sample.
        std: of the weights that are drawn.
    """

    name: str
    classes: str
    vision: Any
    llm: dict[str, Any]
    draw: Draw
    shapes: tuple[Shape, ...] = ((), (), ())
    more: dict[str, Any] = field(default_factory=dict)
    several: tuple[Shape, ...] = ()
    types: str | None = None
    axes: int = 1
    first_position: int = 0
    bidirectional: str = ""
    stacked: bool = False
    counts: str | None = None
    std: float = 0.25


GRIDS = ((4, 4), (3, 5), (2, 6))
SIZES = (WIDE, TALL, LARGE)
QWEN = {"shapes": GRIDS, "types": "mm_token_type_ids", "axes": 3}
SEVERAL = {"several": (ALONE,), "counts": "batch_num_images"}
# before transformers 5.23, the config of VipLLaVA has the plural
VIP_LAYERS = "vision_feature_layer" if hasattr(VipLlavaConfig(), "vision_feature_layer") else "vision_feature_layers"
# before transformers 5.21, Video-LLaVA's images have a name of their own
VIDEO_LLAVA_PIXELS = next(
    name for name in signature(VideoLlavaModel.forward).parameters if name.startswith("pixel_values")
)
PENULTIMATE = {"vision_feature_layer": -2}
PIXTRAL = vision("pixtral", 16, head_dim=8)
MISTRAL = text("mistral", head_dim=16, sliding_window=None)
GEMMA3 = text("gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=20, layer_types=GEMMA3_LAYERS)
QWEN35 = text(
    head_dim=16,
    partial_rotary_factor=1.0,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    **mrope(mrope_interleaved=True),
)
QWEN2_VISION = {"depth": 4, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 4}
QWEN25_VISION = packing(patch_size=14, window_size=56, fullatt_block_indexes=[1, 2, 3])
QWEN3_VISION = packing(deepstack_visual_indexes=[0, 1, 2], num_position_embeddings=64)
QWEN3 = text(head_dim=16, **mrope(mrope_interleaved=True))
OVIS2 = {"visual_indicator_token_ids": [190, 191, 192, START, END], "vocab_size": VOCABULARY, "hidden_size": 64}
LLAMA, QWEN2, COHERE2, LLAVA = text("llama"), text("qwen2"), text("cohere2", **COHERE), square(5, 25)
TILED = square(8, 16, marks=True)

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llava-clip", "Llava", vision(CLIP), LLAMA, LLAVA,
            more={**PENULTIMATE, "vision_feature_select_strategy": "default"},
        ),
        Family(
            "llava-siglip", "Llava", vision(SIGLIP), LLAMA, LLAVA,
            more={**PENULTIMATE, "vision_feature_select_strategy": "full"},
        ),
        Family("vipllava", "VipLlava", vision(CLIP), LLAMA, LLAVA, more={VIP_LAYERS: [-2, 1, 3]}),
        Family("llava-next", "LlavaNext", vision(CLIP, 4), LLAMA, any_resolution, SIZES, PINPOINTS),
        Family(
            "llava-onevision", "LlavaOnevision", vision(SIGLIP, 4), QWEN2, any_resolution, SIZES, PINPOINTS, **SEVERAL
        ),
        Family(
            "llava-onevision-resampled", "LlavaOnevision", vision(SIGLIP, 4), QWEN2, any_resolution, RESAMPLED,
            PINPOINTS | ONE_TILE, **SEVERAL,
        ),
        Family("llava-next-video", "LlavaNextVideo", vision(CLIP, 4), LLAMA, any_resolution, SIZES, PINPOINTS),
        Family("video-llava", "VideoLlava", vision(CLIP), LLAMA, square(5, 25, name=VIDEO_LLAVA_PIXELS)),
        Family("qwen2-vl", "Qwen2VL", QWEN2_VISION, text(**mrope()), packed(14), more=VISION_MARKS, **QWEN),
        Family("qwen2.5-vl", "Qwen2_5_VL", QWEN25_VISION, text(**mrope()), packed(14), more=VISION_MARKS, **QWEN),
        Family("qwen3-vl", "Qwen3VL", QWEN3_VISION, QWEN3, packed(16, timestamps=True), more=VISION_MARKS, **QWEN),
        Family(
            "qwen3.5", "Qwen3_5", packing(num_position_embeddings=64), QWEN35, packed(16, timestamps=True),
            more=VISION_MARKS, **QWEN,
        ),
        Family(
            "internvl", "InternVL", vision("", 8), QWEN2, TILED, ((1,), (3,), (2,)), {"image_seq_length": 16},
        ),
        Family("idefics3", "Idefics3", vision("", 8), LLAMA, tile, more={"scale_factor": 2}, stacked=True),
        Family("smolvlm", "SmolVLM", vision("", 8), LLAMA, tile, more={"scale_factor": 2}, stacked=True),
        Family(
            "gemma3", "Gemma3", vision(SIGLIP, 8), GEMMA3, TILED, types="token_type_ids", bidirectional="image",
            more={"mm_tokens_per_image": 16, "boi_token_index": START, "eoi_token_index": END},
        ),
        Family(
            "paligemma", "PaliGemma", vision(SIGLIP), text("gemma", head_dim=16), LLAVA, types="token_type_ids",
            more={"projection_dim": 64, "hidden_size": 64, "vocab_size": VOCABULARY},
            first_position=1, bidirectional="prompt",
        ),
        Family("mistral3", "Mistral3", PIXTRAL, MISTRAL, pixtral(merge=2), GRIDS, {"spatial_merge_size": 2}),
        Family(
            "pixtral", "Llava", PIXTRAL, MISTRAL, pixtral(merge=1), GRIDS,
            {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        ),
        Family("aya-vision", "AyaVision", vision(SIGLIP, 8), COHERE2, TILED),
        Family("ovis2", "Ovis2", {**vision("", 8), "hidden_stride": 2, "vocab_size": 40}, QWEN2, TILED, more=OVIS2),
        Family(
            "cohere2-vision", "Cohere2Vision", vision(SIGLIP, 8), COHERE2, TILED,
            more={"alignment_intermediate_size": 64},
        ),
        Family("fast-vlm", "FastVlm", TinyTowerConfig(convolutional=True), QWEN2, LLAVA),
        Family(
            "perception-lm", "PerceptionLM", TinyTowerConfig(), LLAMA, square(8, 16, axes=5), ((2,),),
            {"projector_pooling_ratio": 2},
        ),
        Family(
            "glm4v", "Glm4v", packing(image_size=112, patch_size=14), text(**mrope()), packed(14), more=GLM_MARKS,
            **QWEN,
        ),
        # of no family that Tokensieve knows
        Family("lighton-ocr", "LightOnOcr", PIXTRAL, text("qwen3", head_dim=16), pixtral(merge=2), GRIDS),
    )
}  # fmt: skip


def like(name: str, new_name: str, **changes: Any) -> Family:
    """Return a family of the matrix under another name; ``more`` is added to its own."""
    more = FAMILIES[name].more | changes.pop("more", {})
    return replace(FAMILIES[name], name=new_name, more=more, **changes)


def timm(architecture: str, width: int, **arguments: Any) -> dict[str, Any]:
    """Return the config of a real timm vision encoder, whose rows are ``width`` wide."""
    named = {"model_type": "timm_wrapper", "architecture": architecture, "do_pooling": False}
    return {**named, "hidden_size": width, "model_args": arguments}


def timm_families() -> list[Family]:
    """Return the stand-in without [CLS], and families with the real vision encoders where timm is installed."""
    tiles, bare = square(8, 16, axes=5), {"vision_use_cls_token": False}
    families = [like("perception-lm", "perception-lm-no-cls", vision=TinyTowerConfig(class_token=False), more=bare)]
    if find_spec("timm") is not None:
        large, gigantic = "vit_pe_lang_large_patch14_448", "vit_pe_lang_gigantic_patch14_448"
        sizes = {"embed_dim": 32, "depth": 4, "num_heads": 4, "img_size": (112, 112), "ref_feat_shape": (8, 8)}
        shape = {"embed_dims": (8, 8, 8, 64, 64), "layers": (1, 1, 1, 1, 3), "inference_mode": True}
        fast = timm("fastvit_mci3", 128, **shape)
        families += [
            like("perception-lm", large, vision=timm(large, 32, global_pool="", **sizes), draw=tiles),
            like("perception-lm", gigantic, vision=timm(gigantic, 32, global_pool="", **sizes), draw=tiles, more=bare),
            like("fast-vlm", "fastvit_mci3", vision=fast, draw=square(4, 16, patch=64)),
        ]
    return families


FAMILIES |= {family.name: family for family in timm_families()}
for needing, (release, _) in FIRST_RELEASE.items():
    if Version(version("transformers")).release < release:  # refused there
        del FAMILIES[needing]

# -- variants -------------------------------------------------------------------------------------------------------

CORE = ("llava-clip", "llava-siglip", "qwen2.5-vl", "qwen3-vl")  # the families of the method laws
CORE_LLAVA, CORE_QWEN = CORE[:2], CORE[2:]
SIDE = 5  # an image of CORE_LLAVA is SIDE x SIDE patches
DEEP, DEPTH = ("llava-clip-deep", "qwen2.5-vl-deep", "qwen3-vl-deep"), 6  # with LLMs of DEPTH layers
QWEN_VIDEO = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5")
TIMED = ("qwen3-vl", "qwen3.5")  # a timestamp before each frame
VIDEO_SIDE = {"llava-onevision-frames": 5, "llava-next-video-frames": 6, "video-llava-frames": 4}  # patches
VIDEO_FAMILIES = (*QWEN_VIDEO, *VIDEO_SIDE)


def frames_of(name: str, tower: str, draw: Draw, **more: Any) -> Family:
    side = VIDEO_SIDE[f"{name}-frames"]
    pinpoints = {"image_grid_pinpoints": [[side * 14, side * 14], [side * 14, side * 28]]}
    own = {} if name == "video-llava" else pinpoints
    return like(name, f"{name}-frames", vision=vision(tower, side, **more), draw=draw, more=own,
                shapes=((), (), ()), several=(), counts=None)  # fmt: skip


VARIANTS = {
    family.name: family
    for family in (
        *(
            like(name.removesuffix("-deep"), name, std=0.2,
                 llm=FAMILIES[name.removesuffix("-deep")].llm | {"num_hidden_layers": DEPTH})
            for name in DEEP
        ),
        frames_of("llava-onevision", SIGLIP, framed(5, 3, newline=True), vision_use_head=False),
        frames_of("llava-next-video", CLIP, framed(6, 3)),
        frames_of("video-llava", CLIP, framed(4, 4, cls=True)),
    )
}  # fmt: skip


def family(name: str) -> Family:
    return FAMILIES[name] if name in FAMILIES else VARIANTS[name]
