"""Tiny random Qwen-VLs with a processor, saved as vLLM reads them, and prompts for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support import families
from tests.support.families import BOS, END, EOS, FAMILIES, IMAGE, PAD, START, VIDEO, VOCABULARY, Family, mrope
from tests.support.models import build

# vLLM's attention on a CPU has heads of 32 numbers at least
ROPE = mrope(mrope_section=[4, 6, 6])
LLM = {"hidden_size": 128, "max_position_embeddings": 4096, **ROPE}
QWEN3_LLM = LLM | {"head_dim": 32} | mrope(mrope_section=[4, 6, 6], mrope_interleaved=True)
# windows of 4 x 4 tokens, in every second layer
WINDOWS = {"depth": 6, "window_size": 112, "fullatt_block_indexes": [1, 3, 5]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
EXPERTS |= {"norm_topk_prob": True}  # in every checkpoint, and transformers knows no other value


def _served(name: str, vision: dict[str, Any], llm: dict[str, Any], classes: str = "") -> Family:
    like = FAMILIES[name]
    return replace(
        like, name=f"{name}-served", classes=classes or like.classes, vision=like.vision | vision, llm=like.llm | llm
    )


SERVED = {
    "qwen2-vl": _served("qwen2-vl", {"hidden_size": 128}, LLM),
    "qwen2.5-vl": _served("qwen2.5-vl", {"out_hidden_size": 128, **WINDOWS}, LLM),
    "qwen3-vl": _served("qwen3-vl", {"out_hidden_size": 128, "hidden_act": "gelu_pytorch_tanh"}, QWEN3_LLM),
    "qwen3-vl-moe": _served("qwen3-vl", {"out_hidden_size": 128}, QWEN3_LLM | EXPERTS, "Qwen3VLMoe"),
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
SENTENCES = "user assistant system what is the colour of table and first second picture ? < > . seconds one two 7"
WORDS = [*SENTENCES.split(), *"012345689x"]
SPECIAL = {
    "<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": 4, "<|vision_start|>": START, "<|vision_end|>": END,
    "<|video_pad|>": VIDEO, "<|image_pad|>": IMAGE,
}  # fmt: skip


def save(name: str, folder: Path) -> Path:
    """Save the tiny model of a family, with a processor."""
    family = SERVED[name]
    families.VARIANTS[family.name] = family
    build(family.name).save_pretrained(folder)
    if name == "qwen3-vl-moe":
        _turn_experts(folder / "model.safetensors")
    patch = 16 if name.startswith("qwen3") else 14
    save_processor(folder, patch, timestamps=name.startswith("qwen3"))
    return folder


def _turn_experts(file: Path) -> None:
    """Transpose the matrices of experts, as the hub's checkpoints have them; transformers turns them when it loads."""
    from safetensors.torch import load_file, save_file

    turned = {key: w.mT.contiguous() if "mlp.experts." in key else w for key, w in load_file(file).items()}
    save_file(turned, file, {"format": "pt"})


def save_processor(folder: Path, patch: int, timestamps: bool) -> None:
    import transformers
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = [f"w{number}" for number in range(VOCABULARY)]
    names[5 : 5 + len(WORDS)] = WORDS
    for token, number in SPECIAL.items():
        names[number] = token
    core = Tokenizer(WordLevel({word: number for number, word in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = list(SPECIAL)[4:]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=marks
    )
    pixels = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (2 * patch) ** 2 * 700}
    shape = {"size": pixels, "patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    if timestamps:  # as in Qwen3-VL's checkpoints
        shape |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    kind = "Qwen3VL" if timestamps else "Qwen2VL"
    images = transformers.Qwen2VLImageProcessor(**shape)
    videos = getattr(transformers, f"{kind}VideoProcessor")(**shape)
    processor = getattr(transformers, f"{kind}Processor")
    processor(images, tokenizer, videos, TEMPLATE).save_pretrained(folder)


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Draw an image of coarse random squares, so that its tokens differ."""
    cells = np.random.default_rng(seed).integers(0, 256, (-(-height // 7), -(-width // 7), 3), dtype=np.uint8)
    return Image.fromarray(cells.repeat(7, 0).repeat(7, 1)[:height, :width])


def clip(frames: int, height: int, width: int, seed: int) -> Any:
    """Draw a video `[T, H, W, 3]`, and its metadata."""
    shots = [np.asarray(picture(height, width, seed + 1000 * number)) for number in range(frames)]
    data = {"fps": 2.0, "duration": frames / 2, "total_num_frames": frames, "frames_indices": list(range(frames))}
    return np.stack(shots), data | {"video_backend": "opencv", "do_sample_frames": False}


def prompt(*parts: Any, text: str = "what is the colour of table ?", **options: Any) -> dict[str, Any]:
    """Return a prompt for vLLM that shows images and videos in this order, and then the text."""
    marks = {True: "<|vision_start|><|video_pad|><|vision_end|>", False: "<|vision_start|><|image_pad|><|vision_end|>"}
    shown = "".join(marks[isinstance(part, tuple)] for part in parts)
    data = {
        "image": [part for part in parts if not isinstance(part, tuple)],
        "video": [part for part in parts if isinstance(part, tuple)],
    }
    made: dict[str, Any] = {"prompt": f"user {shown}{text} assistant "}
    made["multi_modal_data"] = {kind: items for kind, items in data.items() if items}
    return made | ({"mm_processor_kwargs": options} if options else {})
