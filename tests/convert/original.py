"""Tiny random checkpoints as the authors' code saves them, made of a model of transformers."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tokensieve.reference.model import build_model, build_processor

WIDTH, LAYERS = 32, 2
TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "rms_norm_eps", "max_position_embeddings", "vocab_size", "bos_token_id",
        "eos_token_id")  # fmt: skip
RENAMED = {
    "model.language_model.": "model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
}


@cache
def model() -> Any:
    """Return the model that the checkpoints hold."""
    return build_model(width=WIDTH, vision_layers=3, text_layers=LAYERS).eval()


def weights(tower: bool = True) -> dict[str, Tensor]:
    """Return the model's weights under the authors' names, with or without the vision encoder."""
    theirs = {}
    for name, tensor in model().state_dict().items():
        ours = next((prefix for prefix in RENAMED if name.startswith(prefix)), "")
        if tower or "vision_tower" not in name:
            theirs[RENAMED.get(ours, "") + name.removeprefix(ours)] = tensor.clone()
    return theirs


def settings(**changed: Any) -> dict[str, Any]:
    """Return the authors' config.json; ``None`` leaves an entry out."""
    text = model().config.text_config
    entries = {name: getattr(text, name) for name in TEXT} | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": WIDTH,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "rope_scaling": None,
        "pretraining_tp": 1,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
    }
    return {name: value for name, value in (entries | changed).items() if value is not None or name == "rope_scaling"}


def save(folder: Path, tensors: dict[str, Tensor], kind: str = "safetensors", **changed: Any) -> Path:
    """Write a whole checkpoint: in one file, or "bin" in two shards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings(**changed)))
    build_processor().tokenizer.save_pretrained(folder)
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    placed = {name: files[number % 2] for number, name in enumerate(tensors)}
    for file in files:
        torch.save({name: tensors[name] for name in tensors if placed[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def save_tower(folder: Path, *, other: bool = False) -> Path:
    """Write the model's vision encoder, or another of its shape, with its image processor."""
    tower = CLIPVisionModel(model().config.vision_config)
    if not other:
        tower.load_state_dict(model().model.vision_tower.state_dict())
    tower.save_pretrained(folder)
    build_processor().image_processor.save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """Write a whole CLIP, with the text encoder, around the model's vision encoder."""
    vision = model().config.vision_config
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    clip = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text, projection_dim=8))
    clip.vision_model.load_state_dict(model().model.vision_tower.state_dict())
    clip.save_pretrained(folder)
    build_processor().image_processor.save_pretrained(folder)
    return folder


def save_base(folder: Path) -> Any:
    """Write the LLM that a LoRA was trained on, with its tokenizer, and return it: the model's own weights."""
    base = LlamaForCausalLM(LlamaConfig(**{name: getattr(model().config.text_config, name) for name in TEXT}))
    base.load_state_dict({name: t for name, t in weights(tower=False).items() if "mm_projector" not in name})
    base.save_pretrained(folder)
    build_processor().tokenizer.save_pretrained(folder)
    return base
