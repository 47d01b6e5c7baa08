"""Tiny random models: one with hooks attached by tests, and a twin that no hook ever touches."""

from functools import cache
from typing import Any

import torch
import transformers

from tests.support.families import BOS, IMAGE, PAD, VIDEO, WORDS, family
from tests.support.prompts import batch, collate


@torch.no_grad()
def build(name: str, attention: str = "sdpa") -> Any:
    """Return a new model with seeded weights: equal arguments, equal weights."""
    declared = family(name)
    config_class = getattr(transformers, f"{declared.classes}Config")
    model_class = getattr(transformers, f"{declared.classes}ForConditionalGeneration")
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "tie_word_embeddings": False}
    config = config_class(vision_config=declared.vision, text_config=declared.llm, **declared.more, **tokens)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=attention).eval()
    for key, weight in model.named_parameters():
        if weight.ndim > 1 or "newline" in key:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in key or "newline" in key else declared.std)
        elif "bias" in key:
            torch.nn.init.normal_(weight, std=0.1)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    torch.nn.init.zeros_(model.lm_head.weight[WORDS.stop :])  # never the likeliest: an answer holds no placeholder
    torch.random.set_rng_state(state)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, None
    return model


@cache
def tiny_model(name: str, attention: str = "sdpa") -> Any:
    """Return the model that methods are attached to; every test must leave it detached."""
    model = build(name, attention)
    model.generate(**collate(name, batch(name, "single")), max_new_tokens=1)  # transformers' own lazy hooks
    return model


@cache
def unhooked(name: str, attention: str = "sdpa") -> Any:
    """Return its twin without hooks, for references."""
    return build(name, attention)


def hooks(model: Any) -> int:
    """Count the hooks of a model and all its modules."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def footprint(model: Any) -> list:
    """List all that attaching could change: hooks, and each module's attributes, weights and config by identity."""
    memory = ("rope_deltas", "_previous_max_cache_length")  # what transformers itself remembers of the last call
    out: list = [hooks(model)]
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in vars(module).items() if key not in memory}
        tensors = (module._parameters, module._modules, module._buffers)
        out.append((name, attributes, [(key, id(value)) for part in tensors for key, value in part.items()]))
    return out
