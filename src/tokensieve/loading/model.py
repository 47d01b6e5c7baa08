"""Load a model: its class, its dtype, its device or devices, quantised, with an adapter."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tokensieve.errors import Refusal, first_line
from tokensieve.loading.options import DEFAULTS, LoadOptions, check_environment, torch_device, torch_dtype
from tokensieve.loading.place import find, from_pretrained, may_be_hub_name, refuse_original_format
from tokensieve.loading.processor import load_processor


def load_model(
    name: str, options: LoadOptions = DEFAULTS, *, random: bool = False, classifiers: bool = False
) -> tuple[Any, Any]:
    """Return the model in eval mode on its device or devices, and its processor.

    Args:
        name: a bundled model such as "reference", a folder, or a hub name.
        options: dtype, device, quantisation, adapter, processor options and the like.
        random: random weights instead of the checkpoint's, in an LLM of at most four layers.
        classifiers: also load cross-modal encoders that choose among answers. The error of other commands names the
            commands that support them.

    Raises:
        Refusal: no model of a supported family can be loaded; one line with the reason.
        MissingExtra: an option needs a package that is not installed.
    """
    import torch
    from transformers import AutoConfig

    import tokensieve.fusion.meter  # noqa: F401  # registers METER with transformers

    check_environment(options)
    device = torch_device(options)
    place = find(name, options.revision)
    refuse_original_format(place)
    config = from_pretrained(AutoConfig, place, options)
    loader = _loader(name, config, classifiers)
    dtype = torch_dtype(options, device)
    arguments: dict[str, Any] = {} if options.attn is None else {"attn_implementation": options.attn}
    if random:
        model = _random(config, options, arguments).to(device, torch.float32 if dtype == "auto" else dtype)
    else:
        arguments |= {"dtype": dtype, **_placement(options, device, config)}
        model, outcome = from_pretrained(loader, place, options, output_loading_info=True, **arguments)
        _check_complete(name, outcome["missing_keys"])
        if options.adapter is not None:
            _load_adapter(model, options.adapter)
        if "device_map" not in arguments:  # accelerate's hooks place a mapped model; `.to` would tear it from them
            model = model.to(device)
    return model.eval(), load_processor(place, options)


def device_of(model: Any) -> Any:
    """Return the device for a model's inputs; the weights of an offloaded model stand on the meta device."""
    import torch

    # accelerate's hook on the embeddings holds the device that they run on
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


def devices_of(model: Any) -> list[Any]:
    """Return the devices that a model works on: its inputs' first, then those of weights that other devices hold."""
    first = device_of(model)
    others = {weight.device for weight in model.parameters() if not weight.is_meta} - {first}
    return [first, *sorted(others, key=str)]


def to_model(model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Move tensors to the model's device, and the floating-point ones to its dtype."""
    device = device_of(model)
    return {
        name: tensor.to(device, model.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }


def _loader(name: str, config: Any, classifiers: bool) -> Any:
    """Return the class that loads a model of this config; refuse a model of no supported family."""
    from transformers import AutoModelForImageTextToText

    from tokensieve.engine.fusion.families import FUSION_FAMILIES
    from tokensieve.models import REFUSED, families

    loaders: dict[str, Any] = {kind: AutoModelForImageTextToText for f in families() for kind in f.model_types}
    if classifiers:
        loaders |= {f.model_type: f.classifier() for f in FUSION_FAMILIES if f.classifier is not None}
    if config.model_type in REFUSED:
        raise Refusal(f"{name} is a {config.model_type!r} model, not supported: {REFUSED[config.model_type]}")
    if not classifiers and config.model_type in {family.model_type for family in FUSION_FAMILIES}:
        raise Refusal(
            f"{name} is a {config.model_type!r} model, a cross-modal encoder without a language model to look into; "
            "ask, bench and compare take those that answer questions"
        )
    if hasattr(config, "image_token_id"):  # an unregistered family: its parts are discovered by `attach`
        loaders.setdefault(config.model_type, AutoModelForImageTextToText)
    if config.model_type not in loaders:
        raise Refusal(
            f"{name} is a {config.model_type!r} model, not a supported vision-language model; "
            f"supported: {', '.join(loaders)}"
        )
    return loaders[config.model_type]


def _check_complete(name: str, missing: Collection[str]) -> None:
    """Refuse a checkpoint without some of the model's weights: transformers would draw them at random."""
    if missing:
        examples = ", ".join(sorted(missing)[:2])
        raise Refusal(f"the checkpoint {name} lacks {len(missing)} of the model's weights, such as {examples}")


def _placement(options: LoadOptions, device: Any, config: Any) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that quantise a model or spread it over devices."""
    if options.quantize is None:
        return {} if options.device_map is None else {"device_map": options.device_map}
    import torch
    from transformers import BitsAndBytesConfig

    dtype = torch_dtype(options, device)
    computing = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else dtype
    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": computing}
    quantization = BitsAndBytesConfig(**(four_bits if options.quantize == "4bit" else {"load_in_8bit": True}))
    return {"quantization_config": quantization, "device_map": options.device_map or {"": device}}


def _load_adapter(model: Any, adapter: str) -> None:
    """Put a PEFT adapter on the model, in place: the model stays of its class."""
    from tokensieve.reference import ADAPTERS, adapter_path

    folder = Path(os.path.expanduser(adapter))
    if not folder.exists():
        folder = adapter_path(adapter) or folder
    if not folder.exists() and not may_be_hub_name(adapter):
        raise Refusal(f"no adapter at {adapter}: it does not exist; bundled are {', '.join(ADAPTERS)}")
    if folder.exists() and not (folder / "adapter_config.json").is_file():
        raise Refusal(f"no adapter at {adapter}: it has no adapter_config.json")
    if any(weight.is_meta for weight in model.parameters()):
        # transformers would put the adapter's weights on the meta device, too, and answers would be NaN
        raise Refusal(f"the adapter {adapter} cannot be put on offloaded weights; merge it first, or offload nothing")
    try:
        outcome = model.load_adapter(str(folder) if folder.exists() else adapter)
    except Exception as error:  # another shape, another kind of adapter, a broken file, no network: many types
        raise Refusal(f"the adapter {adapter} does not fit {type(model).__name__}: {first_line(error)}") from error
    if unused := sorted({*outcome.unexpected_keys, *outcome.missing_keys}):
        raise Refusal(f"the adapter {adapter} does not fit {type(model).__name__}: {unused[0]} has no counterpart")


def _random(config: Any, options: LoadOptions, arguments: dict[str, Any]) -> Any:
    """Return a model of this config with random weights, equal in every call, and at most four layers in its LLM."""
    import torch
    from transformers import AutoModelForImageTextToText

    unfit = [name for name in ("quantize", "device_map", "adapter") if getattr(options, name) is not None]
    if unfit:
        raise Refusal(f"random weights are made on one device and in one dtype; leave {', '.join(unfit)} out")
    text = config.get_text_config()
    text.num_hidden_layers = min(4, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    arguments |= {"trust_remote_code": options.trust_remote_code}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, **arguments)
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # smaller weights would give almost uniform attention
                weight.normal_(std=1.0 if "embed" in name else 2 * weight[0].numel() ** -0.5)
    return model
