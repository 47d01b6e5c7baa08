"""Add a LoRA of PEFT's format to the weights of its base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokensieve.errors import Refusal

ADAPTER, CONFIG = ("adapter_model.safetensors", "adapter_model.bin"), "adapter_config.json"
FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
UNSUPPORTED = ("use_dora", "fan_in_fan_out", "alpha_pattern", "lora_bias", "layer_replication")


def plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the modules that PEFT puts around a model in their names."""
    return {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}


def merge(weights: dict[str, Tensor], adapter: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Add B · A · scale to each adapted weight, in float32; put the adapter's whole weights in place of the base's.

    Args:
        weights: of the base, by name; changed.
        adapter: A `[r, in]` and B `[out, r]` of each adapted weight `[out, in]`.
        settings: ``adapter_config.json``. The scale is alpha / r, or alpha / √r with ``use_rslora``.

    Raises:
        Refusal: if the adapter is no plain LoRA, or does not fit the base.
    """
    if (kind := settings.get("peft_type")) != "LORA":
        raise Refusal(f"{CONFIG} has peft_type {kind!r}; supported: 'LORA'")
    if refused := [f"{name}={settings[name]!r}" for name in UNSUPPORTED if settings.get(name)]:
        raise Refusal(f"{CONFIG} has {', '.join(refused)}; supported: plain LoRA, with or without use_rslora")
    alpha = settings.get("lora_alpha")
    if not isinstance(alpha, int | float):
        raise Refusal(f"{CONFIG} must have a number as lora_alpha; got {alpha!r}")
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in plain(adapter).items():
        if match := FACTOR.fullmatch(name):
            factors.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
        elif ".lora_" in name:
            raise Refusal(
                f"the adapter's {name} is no factor of a linear map; supported: *.lora_A.weight, *.lora_B.weight"
            )
        else:
            weights[name] = tensor
    for name, pair in factors.items():
        weights[name] = _merged(name, weights.get(name), pair, alpha, bool(settings.get("use_rslora")))


def _merged(name: str, weight: Tensor | None, pair: Mapping[str, Tensor], alpha: float, by_root: bool) -> Tensor:
    if weight is None:
        raise Refusal(f"the base has no {name}, which the adapter changes")
    if len(pair) < 2:
        raise Refusal(f"the adapter has one of the two factors of {name}: lora_{next(iter(pair))}")
    down, up = pair["A"].float(), pair["B"].float()
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != len(down) or (len(up), down.shape[1]) != tuple(weight.shape):
        shapes = f"B {list(up.shape)} and A {list(down.shape)}"
        raise Refusal(f"the adapter's {shapes} do not fit {name} of the base, {list(weight.shape)}")
    scale = alpha / len(down) ** (0.5 if by_root else 1.0)
    merged: Tensor = weight.float() + (up @ down) * scale
    return merged.to(weight.dtype)
