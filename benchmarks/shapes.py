"""Models with random weights, made on the device, and their prompts: shared by the benchmarks.

:func:`build` and :func:`prompt` are the LLaVA-1.5 of `overhead.py`, `decoder.py` and `encoder.py`. :data:`SHAPES` are
whole models at their published size, or tiny ones of the same kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

IMAGE, VOCABULARY, PROMPT, ANSWER_CUE = 9, 1000, 35, 20
LLM = {
    "mid": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 8, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}


def build(llm: str, dtype: torch.dtype, device: str, attention: str = "sdpa") -> Any:
    """A randomly initialised LLaVA-1.5 of the given size ("tiny" only checks that this script runs)."""
    tiny = llm == "tiny"
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**(TINY | {"image_size": 336, "patch_size": 14} if tiny else TOWER)),
        text_config=LlamaConfig(**(TINY if tiny else LLM[llm]), vocab_size=VOCABULARY, max_position_embeddings=4096),
        image_token_id=IMAGE,
    )
    return _random(LlavaForConditionalGeneration, config, dtype, device, attention)


def _random(model_class: Any, config: Any, dtype: torch.dtype, device: str, attention: str) -> Any:
    """A model with random weights, drawn on the device, in eval mode."""
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class._from_config(config, attn_implementation=attention, dtype=dtype)
    return model.eval()


def prompt(batch: int, model: Any) -> dict[str, Tensor]:
    """A batch of equal prompts: 35 tokens, one image of 576, 20 tokens (LLaVA-1.5's template and a short question)."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(10, VOCABULARY, (batch, PROMPT + ANSWER_CUE), generator=generator)
    image = torch.full((batch, 576), IMAGE)
    pixels = torch.randn(batch, 3, 336, 336, generator=generator)
    ids = torch.cat([words[:, :PROMPT], image, words[:, PROMPT:]], 1)
    return {"input_ids": ids.to(model.device), "pixel_values": pixels.to(model.device, model.dtype)}


# -- whole models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A whole model.

    Attributes:
        model_class: its class in transformers.
        config: its config.
        side: side of its square images in pixels.
        image_tokens: visual tokens of an image.
    """

    model_class: Any
    config: Any
    side: int
    image_tokens: int

    def build(self, dtype: torch.dtype, device: str, attention: str = "sdpa") -> Any:
        """Return the model with random weights, in eval mode."""
        return _random(self.model_class, self.config, dtype, device, attention)

    def prompts(self, model: Any, words: Sequence[int], numbers: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return a left-padded batch: a row has ``PROMPT`` tokens, one image, and ``words[row]`` tokens.

        Args:
            numbers: the number of each row, which decides its words and its image; by default they count from 0.
        """
        generators = [torch.Generator().manual_seed(n) for n in (range(len(words)) if numbers is None else numbers)]
        longest, image = max(words), torch.full((self.image_tokens,), IMAGE)
        rows, masks = [], []
        for count, generator in zip(words, generators, strict=True):
            text = torch.randint(10, 100, (PROMPT + count,), generator=generator)
            padding = torch.zeros(longest - count, dtype=torch.long)
            rows.append(torch.cat([padding, text[:PROMPT], image, text[PROMPT:]]))
            masks.append(torch.cat([padding, torch.ones(len(rows[-1]) - len(padding), dtype=torch.long)]))
        inputs = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}
        pixels = torch.cat([self._image(generator) for generator in generators])
        inputs["pixel_values"] = pixels.to(model.dtype)
        if self.config.model_type == "qwen2_5_vl":
            side = self.side // self.config.vision_config.patch_size
            inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * len(rows))
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
        elif self.config.model_type == "llava_next":
            inputs["image_sizes"] = torch.tensor([[self.side, self.side]] * len(rows))
        return {name: value.to(model.device) for name, value in inputs.items()}

    def _image(self, generator: torch.Generator) -> Tensor:
        """Draw the pixels of one image, as the model's processor packs them."""
        vision = self.config.vision_config
        if self.config.model_type == "qwen2_5_vl":
            patches, width = (self.side // vision.patch_size) ** 2, vision.in_channels * vision.patch_size**2
            return torch.randn(patches, width * vision.temporal_patch_size, generator=generator)
        if self.config.model_type == "llava_next":
            # the same image in each row: how many newlines stay depends on the image, and benchmarks need equal rows
            tiles = 1 + (self.side // vision.image_size) ** 2
            same = torch.Generator().manual_seed(0)
            return torch.randn(1, tiles, 3, vision.image_size, vision.image_size, generator=same)
        return torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)


def _shapes(toy: bool) -> dict[str, Shape]:
    clip = TINY | {"image_size": 84, "patch_size": 14} if toy else TOWER
    llama = LlamaConfig(**(TINY if toy else LLM["7b"]), vocab_size=200 if toy else 32064, max_position_embeddings=4096)
    tile = clip["image_size"]
    base = (tile // clip["patch_size"]) ** 2
    pinpoints = [[tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile], [3 * tile, tile], [tile, 3 * tile]]
    mosaic = 2 * tile // clip["patch_size"]
    marks = {"image_token_id": IMAGE, "video_token_id": 8, "vision_start_token_id": 6, "vision_end_token_id": 7}
    qwen_text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    qwen_text |= {"num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768}
    qwen_text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sections, qwen_vision = [16, 24, 24], {"out_hidden_size": 3584}
    if toy:
        qwen_text |= TINY | {"num_key_value_heads": 2, "vocab_size": 200}
        sections = [2, 3, 3]
        qwen_vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64}
        qwen_vision |= {"window_size": 56, "fullatt_block_indexes": [1, 3]}
    qwen_text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}}
    qwen = Qwen2_5_VLConfig(text_config=qwen_text, vision_config=qwen_vision, tie_word_embeddings=False, **marks)
    side = 112 if toy else 672
    vision = {"vision_config": CLIPVisionConfig(**clip), "text_config": llama, "image_token_id": IMAGE}
    return {
        "llava-1.5-7b": Shape(LlavaForConditionalGeneration, LlavaConfig(**vision), tile, base),
        "llava-next-7b": Shape(
            LlavaNextForConditionalGeneration,
            LlavaNextConfig(**vision, image_grid_pinpoints=pinpoints),
            2 * tile,
            base + mosaic * (mosaic + 1),
        ),
        "qwen2.5-vl-7b": Shape(Qwen2_5_VLForConditionalGeneration, qwen, side, (side // 28) ** 2),
    }


SHAPES, TOY_SHAPES = _shapes(toy=False), _shapes(toy=True)
