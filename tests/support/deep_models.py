"""The tiny models of the laws with more blocks, so that tokens can leave at several of them."""

import copy
from functools import cache

import torch

from tests.support import laws_tiny as tiny

DEPTH = 6
FAMILIES = ("llava-clip", "qwen2.5-vl", "qwen3-vl")


def build(family: str, attention: str = "sdpa", depth: int = DEPTH):
    """A new model with seeded weights: equal arguments, equal weights."""
    shallow = tiny.pristine(family, attention)
    config = copy.deepcopy(shallow.config)
    config.text_config.num_hidden_layers = depth
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = ["full_attention"] * depth
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = type(shallow)._from_config(config, attn_implementation=attention).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 0.2)
        elif "bias" in name:
            torch.nn.init.normal_(weight, std=0.1)
    torch.random.set_rng_state(state)
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = tiny.PAD, tiny.BOS, None
    return model


@cache
def subject(family: str, attention: str = "sdpa"):
    """The model that methods are attached to; every test must leave it detached."""
    return build(family, attention)


@cache
def pristine(family: str, attention: str = "sdpa"):
    """Its twin, which no hook ever touches: what is computed by hand is computed with it."""
    return build(family, attention)
