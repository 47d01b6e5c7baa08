"""Load a model and its processor by name, with one clear line when that fails."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokensieve.errors import Refusal

if TYPE_CHECKING:
    from torch import Tensor

    from tokensieve.evaluate import Sample

COMPARED_WITH = {"pumer-reference": "vilt-reference"}


def load_model(
    name: str, dtype: str | None = None, random: bool = False, *, classifiers: bool = False
) -> tuple[Any, Any]:
    """Return the model in eval mode on its device (a GPU if there is one), and its processor.

    Args:
        name: a bundled model such as "reference", a folder, or a hub name.
        dtype: a torch dtype by name; by default the checkpoint's on a GPU, float32 elsewhere.
        random: random weights instead of the checkpoint's, in an LLM of at most four layers.
        classifiers: also load cross-modal encoders that choose among answers. The error of other commands names the
            commands that support them.

    Raises:
        Refusal: no model of a supported family can be loaded; one line with the reason.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    import tokensieve.fusion.meter  # noqa: F401  # registers METER with transformers
    from tokensieve.engine.fusion.families import FUSION_FAMILIES
    from tokensieve.models import REFUSED, families

    place = find(name)
    config = _from_pretrained(AutoConfig, place)
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
    gpu = torch.cuda.is_available()
    precision = ("auto" if gpu else torch.float32) if dtype is None else getattr(torch, dtype)
    if random:
        model = _random(config).to(torch.float32 if precision == "auto" else precision)
    else:
        model = _from_pretrained(loaders[config.model_type], place, dtype=precision)
    processor = _from_pretrained(AutoProcessor, place)
    return model.eval().to("cuda" if gpu else "cpu"), processor


def trained_spec(name: str, model: Any) -> str:
    """Return the spec that a classifier was fine-tuned with, stored beside its weights by `train pumer`; else PuMer.

    Raises:
        Refusal: it was fine-tuned without a method, and PuMer's defaults do not fit it.
    """
    from tokensieve.engine import attach

    note = Path(find(name).path) / "tokensieve.json"
    if note.is_file():
        try:
            method = json.loads(note.read_text("utf-8"))["method"]
        except (ValueError, KeyError, TypeError):
            raise Refusal(f"{note} is not a file of `tokensieve train pumer`") from None
        if method is not None:
            return str(method)
    try:
        attach(model, "pumer").detach()
    except Refusal as error:
        raise Refusal(
            f"{name} was not fine-tuned with a method, and pumer as it stands does not fit ({error}); name "
            "one, such as 'pumer(layers=(2, 4))'"
        ) from error
    return "pumer"


def inputs_of(model: Any, processor: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return one batch of prompts for a model that generates or classifies answers, on its device and in its dtype."""
    from tokensieve.engine.fusion.families import longest_text
    from tokensieve.evaluate.prompt import encode, encode_pairs, to_model

    if model.can_generate():
        inputs = encode(processor, samples)
    else:
        inputs = encode_pairs(processor, samples, longest=longest_text(model.config))
    return to_model(model, inputs)


@dataclass(frozen=True)
class Place:
    """Path or hub name of a model; ``unreachable`` is the hub's error, after which only the local cache is searched."""

    path: str
    unreachable: str = ""


def find(name: str) -> Place:
    """Resolve the user's name: a bundled model, a folder, or a model on the hub."""
    from tokensieve.reference import NAMES
    from tokensieve.reference import path as bundled

    path = Path(name).expanduser()
    if (name in NAMES or name.startswith("reference")) and not path.exists():
        path = bundled(name)
    if not path.exists() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return Place(name, unreachable=_hub_refusal(name))
    if not (path / "config.json").is_file():
        missing = "has no config.json" if path.is_dir() else "is not a folder" if path.exists() else "does not exist"
        raise Refusal(f"no model at {name}: it {missing}")
    return Place(str(path))


def _hub_refusal(name: str) -> str:
    """Return the hub's error, after one quick request: without a network, loading would retry for half a minute."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # no network, no such model, no permission: many types from several libraries
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ""


def _from_pretrained(loader: Any, place: Place, **options: Any) -> Any:
    try:
        return loader.from_pretrained(place.path, local_files_only=bool(place.unreachable), **options)
    except Exception as error:  # broken model files raise many types
        if place.unreachable:
            why = f"it is no folder, it is not in the local cache, and the hub does not answer ({place.unreachable})"
            raise Refusal(f"no model {place.path}: {why}") from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise Refusal(f"the model {place.path} does not load: {reason}") from error


def _random(config: Any) -> Any:
    """Return a model of this config with random weights, equal in every call, and at most four layers in its LLM."""
    import torch
    from transformers import AutoModelForImageTextToText

    text = config.get_text_config()
    text.num_hidden_layers = min(4, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # smaller weights would give almost uniform attention
                weight.normal_(std=1.0 if "embed" in name else 2 * weight[0].numel() ** -0.5)
    return model
