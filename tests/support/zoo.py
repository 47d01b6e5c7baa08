"""A tiny random model of every image-text-to-text type of transformers, made by shrinking the type's default config.

``models.py`` builds the families that Tokensieve declares. Here, sizes are replaced by name, from the tables of
``zoo_sizes.py``. ``zoo_prompts.py`` draws the images and prompts.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.support.zoo_sizes import BOS, CHANGES, LAYERS, MROPE, PAD, TEXT, TOP, VISION, WORDS

TYPES: tuple[str, ...] = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
LARGEST = 2e7


def changed(config: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return one level of a config with the sizes that it has replaced, and the lists of its layers shortened."""
    kinds, depth = config.get("layer_types") or config.get("mlp_layer_types"), config.get("num_hidden_layers")
    layers = list(range(LAYERS))
    if kinds:  # every kind of layer, in the order of the default
        firsts = sorted({kind: kinds.index(kind) for kind in kinds}.values())
        rest = [layer for layer in range(len(kinds)) if layer not in firsts]
        layers, depth = sorted([*firsts, *rest][:LAYERS]), len(kinds)
    out = {}
    for name, value in config.items():
        if isinstance(value, list) and depth and len(value) == depth > LAYERS:
            value = [value[layer] for layer in layers]
            value = [sizes[name]] * LAYERS if name in sizes else value
        elif isinstance(value, list) and name in ("intermediate_size", "moe_intermediate_size"):
            value = [sizes[name]] * len(value)
        elif name in sizes:
            value = sizes[name]
        if name == "rope_parameters" and value:
            value = {k: shortened(v) if isinstance(v, dict) else v for k, v in shortened(value).items()}
        out[name] = value
    if isinstance(out.get("patch_size"), int) and "image_size" in out:
        side = 8 * out["patch_size"]
        out["image_size"] = [side, side] if isinstance(out["image_size"], list | tuple) else side
    out.pop("per_layer_config", None)
    if "global_attn_indexes" in out:  # SAM: 16x smaller in the end
        out["image_size"] = 4 * out["patch_size"]
    return out


def shortened(rope: dict[str, Any]) -> dict[str, Any]:
    if rope.get("rope_type") == "default" and "partial_rotary_factor" in rope:
        rope = rope | {"partial_rotary_factor": 1.0}
    return rope | ({"mrope_section": [2, 3, 3]} if "mrope_section" in rope else {})


def source(config_class: Any) -> str:
    """Return the source of the model of a config class."""
    module = config_class.__module__.replace("configuration_", "modeling_")
    return inspect.getsource(importlib.import_module(module))


def tiny_config(model_type: str) -> Any:
    """Return the shrunk config of a type."""
    config_class = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]).config_class

    def shrink(config: dict[str, Any], path: str) -> dict[str, Any]:
        last = path.rpartition(".")[2]
        text = not path or "text" in last or last in ("decoder", "encoder")
        sizes = (TEXT if text else VISION) | (TOP if not path else {})
        parts = {
            k: shrink(v, f"{path}.{k}".strip("."))
            for k, v in config.items()
            if isinstance(v, dict) and k.endswith("config") and k != "per_layer_config"
        }
        return changed(config, sizes) | parts

    changes, default = CHANGES.get(model_type, {}), config_class().to_dict()
    for path, values in changes.items():  # before shrinking: parts of another type, parts that the default lacks
        if "model_type" in values and path:
            part = transformers.AutoConfig.for_model(values["model_type"]).to_dict()
            default[path] = part
    shrunk = shrink(default, "")
    for path, values in changes.items():
        part = shrunk
        for name in filter(None, path.split(".")):
            part = part[name]
        part.update(values)
    rope = shrunk.get("text_config", {}).get("rope_parameters")
    wide = "mrope_section" in source(config_class) or shrunk.get("text_config", {}).get("model_type") in MROPE
    if rope and "rope_type" in rope and wide:  # the default is for wide heads
        rope.setdefault("mrope_section", [2, 3, 3])
    shrunk.pop("model_type", None)
    return config_class(**shrunk)


@torch.no_grad()
def tiny_model(model_type: str, attention: str = "sdpa") -> Any:
    """Return a new model of a type with seeded weights."""
    model_class = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in model_class._from_config(tiny_config(model_type)).parameters())
    if weights > LARGEST:  # a size that the tables do not name has stayed
        raise RuntimeError(f"its config shrinks to {weights / 1e6:.0f} million weights only")
    try:
        model = model_class._from_config(tiny_config(model_type), attn_implementation=attention).eval()
    except ValueError:  # some have no attention but eager
        torch.manual_seed(0)
        model = model_class._from_config(tiny_config(model_type), attn_implementation="eager").eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 or "newline" in name:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name or "newline" in name else 0.25)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.1)
    torch.random.set_rng_state(state)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, None
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        torch.nn.init.zeros_(head.weight[WORDS.stop :])  # never the likeliest: an answer holds no placeholder
    return model
