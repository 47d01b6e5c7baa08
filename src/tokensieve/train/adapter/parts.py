"""Prepare the tuned parts: adapters on the linear layers of projector and LLM, or the weights themselves."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import nn

from tokensieve.errors import MissingExtra, Refusal
from tokensieve.models import family_of
from tokensieve.train.adapter.recipe import Recipe


def prepared(model: Any, recipe: Recipe, base: str) -> Any:
    """Freeze a model except for what the recipe tunes; return it, or the PEFT model around it.

    Args:
        base: the name of the model, which is stored with the adapter.

    Raises:
        Refusal: the projector has no linear layer.
        MissingExtra: PEFT is not installed.
    """
    model.requires_grad_(False)
    projector = _projector(model)
    if recipe.parts == "all":
        for part in (projector, model.get_decoder(), model.get_output_embeddings()):
            if part is not None:
                part.requires_grad_(True)
        return model
    if find_spec("peft") is None:
        raise MissingExtra("adapters need peft", "peft")
    from peft import LoraConfig, get_peft_model

    names = _linear_layers(model, projector)
    if recipe.parts == "lora":
        names += _linear_layers(model, model.get_decoder())
    if not names:
        raise Refusal(f"the projector of {type(model).__name__} has no linear layers of its own; use parts='lora'")
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.scale, target_modules=names, bias="none")
    tuned = get_peft_model(model, config)
    config.base_model_name_or_path = base  # as the user named it: PEFT wrote the folder that it was loaded from
    return tuned


def _projector(model: Any) -> nn.Module | None:
    """Return the projector; ``None`` in a family of which nothing is known."""
    try:
        return family_of(model).projector(model)
    except Refusal:
        return None


def _linear_layers(model: Any, part: nn.Module | None) -> list[str]:
    """Return the names in the model of all linear layers of a part."""
    inside = set() if part is None else {id(layer) for layer in part.modules() if isinstance(layer, nn.Linear)}
    return [name for name, layer in model.named_modules() if id(layer) in inside]
