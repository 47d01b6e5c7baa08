"""A model and its processor by name, with one clear line when that fails."""

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
    """The model in eval mode on its device (a GPU if there is one), and its processor.

    Args:
        name: a bundled model such as "reference", a folder, or a hub name.
        dtype: a torch dtype by name; by default the checkpoint's on a GPU, float32 elsewhere.
        random: random weights instead of the checkpoint's, in an LLM of at most four blocks.
        classifiers: also take cross-modal encoders that choose among answers; other commands say which do.

    Raises:
        ValueError: if nothing of a supported family loads from there; one line that says why.
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
    if hasattr(config, "image_token_id"):  # what an unknown one looks like shows when a method is attached
        loaders.setdefault(config.model_type, AutoModelForImageTextToText)
    if config.model_type not in loaders:
        raise Refusal(
            f"{name} is a {config.model_type!r} model, not a supported vision-language model; "
            f"supported: {', '.join(loaders)}"
        )
    gpu = torch.cuda.is_available()
    wanted = ("auto" if gpu else torch.float32) if dtype is None else getattr(torch, dtype)
    if random:
        model = _random(config).to(torch.float32 if wanted == "auto" else wanted)
    else:
        model = _from_pretrained(loaders[config.model_type], place, dtype=wanted)
    processor = _from_pretrained(AutoProcessor, place)
    return model.eval().to("cuda" if gpu else "cpu"), processor


def trained_spec(name: str, model: Any) -> str:
    """The method that a classifier was fine-tuned with, as `train pumer` left it beside the weights; else PuMer.

    Raises:
        ValueError: if it was fine-tuned without one, and plain PuMer does not fit it.
    """
    from tokensieve.engine import attach

    note = Path(find(name).path) / "tokensieve.json"
    method = json.loads(note.read_text())["method"] if note.is_file() else None
    if method is not None:
        return str(method)
    try:
        attach(model, "pumer").detach()
    except ValueError as error:
        raise Refusal(
            f"{name} was not fine-tuned with a method, and pumer as it stands does not fit ({error}); name "
            "one, such as 'pumer(layers=(2, 4))'"
        ) from error
    return "pumer"


def inputs_of(model: Any, processor: Any, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """One batch of prompts for a model that generates or classifies answers, on its device and in its dtype."""
    from tokensieve.engine.fusion.families import longest_text
    from tokensieve.evaluate import encode, encode_pairs

    if model.can_generate():
        inputs = encode(processor, samples)
    else:
        inputs = encode_pairs(processor, samples, longest=longest_text(model.config))
    moved = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    return {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in moved.items()}


@dataclass(frozen=True)
class Place:
    """Where a model lies; ``unreachable`` says why the hub cannot be asked, when it cannot: then only the cache can."""

    path: str
    unreachable: str = ""


def find(name: str) -> Place:
    """What the user's name means: a bundled model, a folder, or a model on the hub."""
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
    """Ask the hub once, quickly: without a network, loading would retry for half a minute first."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # no network, no such model, no permission: many types from several libraries
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ""


def _from_pretrained(loader: Any, place: Place, **options: Any) -> Any:
    try:
        return loader.from_pretrained(place.path, local_files_only=bool(place.unreachable), **options)
    except Exception as error:  # whatever is wrong with a model's files surfaces here, in many types
        if place.unreachable:
            why = f"it is no folder, it is not in the local cache, and the hub does not answer ({place.unreachable})"
            raise Refusal(f"no model {place.path}: {why}") from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise Refusal(f"the model {place.path} does not load: {reason}") from error


def _random(config: Any) -> Any:
    """A model of this config with random weights, equal ones every time, and few blocks in its LLM."""
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
            if weight.ndim > 1:  # wide enough for attention that is not flat
                weight.normal_(std=1.0 if "embed" in name else 2 * weight[0].numel() ** -0.5)
    return model
