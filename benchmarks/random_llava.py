"""Write a LLaVA-1.5 with random weights, 576 visual tokens and a wide LLM: its prefill dominates a request.

``python benchmarks/random_llava.py FOLDER [--width 768] [--layers 8]``. The answers mean nothing; servers load it as
any checkpoint, so that loads of real proportions run on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tokensieve.reference.model import CHAT_TEMPLATE, build_tokenizer

SIDE, PATCH = 336, 14


def main(
    folder: Path,
    width: Annotated[int, typer.Option(help="Hidden size of the LLM.")] = 768,
    layers: Annotated[int, typer.Option(help="Layers of the LLM.")] = 8,
) -> None:
    """Write model and processor to a folder."""
    tokenizer = build_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=4096,
            **special,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
        **special,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    # vLLM's own class knows the names of older transformers only
    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): rows for name, rows in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    typer.run(main)
