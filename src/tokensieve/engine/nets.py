"""Nets of trained methods: make one for a model, and store it in a folder without anything executable.

A folder holds ``net.safetensors``, the net's own parameters, and ``method.json``: the method, the model that the net
fits, the net's sizes, and how it was trained.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.errors import Refusal, first_line
from tokensieve.fusion.convert.read import read_weights
from tokensieve.methods import Method, ModelShape, TrainedMethod
from tokensieve.models import family_of

FORMAT = 1
ABOUT, PARAMETERS = "method.json", "net.safetensors"
BUNDLED, RANDOM = "bundled", "random"


def depth_of(model: Any) -> int:
    """Return the number of layers of the LLM."""
    layers = getattr(model.get_decoder(), "layers", None)
    return int(model.config.get_text_config().num_hidden_layers) if layers is None else len(layers)


def shape_of(model: Any) -> ModelShape:
    """Return what a net must know of a model."""
    width, family = int(model.config.get_text_config().hidden_size), family_of(model)
    patch_width = tower_width = 0
    if not family.encoder_unreadable:
        tower_width = _input_width(*family.attentions(family.tower(model))[:1])
        with suppress(Refusal):  # nothing is known about the projector
            patch_width = _input_width(family.projector(model))
    heads = int(getattr(model.config.get_text_config(), "num_attention_heads", 0))
    return ModelShape(model.config.model_type, width, depth_of(model), patch_width, tower_width, heads)


def _input_width(*modules: nn.Module) -> int:
    """Return the width of the rows that enter the first linear map, or a norm; 0: there is neither."""
    linear = (part.in_features for module in modules for part in module.modules() if isinstance(part, nn.Linear))
    return next(linear, 0) or next((weight.shape[-1] for module in modules for weight in module.parameters()), 0)


def load_nets(model: Any, methods: Sequence[Method]) -> dict[str, nn.Module]:
    """Return the net of each trained method by its stage, in evaluation mode and without gradients.

    Raises:
        Refusal: if a folder of weights is none, or is of another method or model.
    """
    trained = [method for method in methods if isinstance(method, TrainedMethod) and method.has_net]
    return {method.info.stage: load_net(method, shape_of(model), model.get_decoder()) for method in trained}


def load_net(method: TrainedMethod, shape: ModelShape, llm: Any = None) -> nn.Module:
    """Return the net of a method for a model of this shape, float32 on the CPU; raises as :func:`load_nets`.

    Args:
        llm: the model's LLM, for a net that copies layers of it.
    """
    if method.weights == RANDOM:
        return _new(method, shape, llm)
    folder = folder_of(method)
    if not folder.is_dir():
        raise Refusal(
            f"no weights of {method.info.name} at {folder}: {'not a' if folder.exists() else 'no such'} folder"
        )
    if (method.published or method.published_file) and not (folder / ABOUT).exists():
        return _published_net(method, shape, folder, llm)
    about = read_about(folder)
    name = about["method"].partition("(")[0]
    if name not in (method.info.name, method.shares_weights):
        raise Refusal(f"the weights in {folder} are those of {name}; got {method.info.name}")
    fits = replace(shape, **about["model"])
    if fits != shape:
        remedy = f"train them with `tokensieve train {method.info.name}`, or give weights='random'"
        if _words(fits) == _words(shape):
            widths = [f"{s.tower_width}, and {s.patch_width} before the projector" for s in (fits, shape)]
            raise Refusal(
                f"the weights in {folder} fit a vision encoder of width {'; this one has '.join(widths)}: {remedy}"
            )
        raise Refusal(f"the weights in {folder} fit {_words(fits)}; this model is {_words(shape)}: {remedy}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        parameters = load_file(folder / PARAMETERS)
        net = _new(method, shape, llm, about["net"])
        net.load_state_dict(parameters)
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:
        raise Refusal(f"{folder / PARAMETERS} is not a net of {name}: {first_line(error)}") from None
    broken = not_finite(net)
    if broken:
        raise Refusal(f"{folder / PARAMETERS} is damaged, or of a training that diverged: {broken} is not finite")
    return net


def not_finite(net: nn.Module) -> str | None:
    """Return the name of a parameter that holds NaN or infinity; ``None``: there is none."""
    return next((name for name, rows in net.state_dict().items() if not rows.isfinite().all()), None)


def _published_net(method: TrainedMethod, shape: ModelShape, folder: Path, llm: Any) -> nn.Module:
    """Return the net in an authors' checkpoint; its other parameters, those of the model, are not read."""
    from safetensors import SafetensorError, safe_open

    parameters: dict[str, Tensor] = {}
    try:
        if method.published_file:
            parameters = read_weights(folder / method.published_file)
        else:
            for file in sorted(folder.glob("*.safetensors")):
                with safe_open(file, framework="pt") as checkpoint:
                    names = method.names_in(checkpoint.keys())
                    parameters |= {short: checkpoint.get_tensor(name) for name, short in names.items()}
            alone = f"{method.published}bin"  # such as mm_projector.bin
            for file in sorted((*folder.glob("pytorch_model*.bin"), *folder.glob(alone))):
                weights = read_weights(file)
                parameters |= {short: weights[name] for name, short in method.names_in(weights).items()}
        if not parameters:
            raise Refusal(
                f"{folder} has no weights of {method.info.name}: neither {ABOUT}, nor a safetensors or .bin file with "
                f"names such as {method.published}*"
            )
        net = _new(method, shape, llm, method.sizes_of(parameters))
        net.load_state_dict(parameters)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        reason = first_line(error)
        raise Refusal(
            f"the checkpoint {folder} does not fit {method.info.name} and {_words(shape)}: {reason}"
        ) from None
    return net


def folder_of(method: TrainedMethod) -> Path:
    """Return the folder of a method's weights; refuse a method whose weights are not bundled."""
    if method.weights != BUNDLED:
        return Path(os.path.expanduser(method.weights))
    folder = Path(str(files("tokensieve"))) / "reference" / "weights" / (method.shares_weights or method.info.name)
    if not folder.is_dir():
        name = method.info.name
        raise Refusal(
            f"{name} has no bundled weights: run `tokensieve train {name}` and give weights=FOLDER, or weights='random'"
        )
    return folder


def read_about(folder: Path) -> dict[str, Any]:
    """Read ``method.json``.

    Raises:
        Refusal: if it is missing or damaged, or of another version.
    """
    file = folder / ABOUT
    try:
        about = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise Refusal(f"{folder} is no folder of a trained method: it has no {ABOUT}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"cannot read {file}: {first_line(error)}") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        got = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise Refusal(f"{file} has format {got!r}; this Tokensieve reads format {FORMAT}")
    model, names = about.get("model"), {"type", "width", "layers"}
    whole = isinstance(about.get("method"), str) and isinstance(about.get("net"), dict)
    numbers = ModelShape.__dataclass_fields__.keys()  # a net that reads nothing in the encoder may leave some out
    if not whole or not isinstance(model, dict) or not names <= model.keys() <= numbers:
        raise Refusal(f"{file} must name the method, the net and the model ({', '.join(sorted(names))})")
    return about


def save_net(folder: Path, method: TrainedMethod, shape: ModelShape, net: nn.Module, about: Mapping[str, Any]) -> None:
    """Write the folder of a trained net; a reader never sees half a file.

    Args:
        about: further entries of ``method.json``: "net" (sizes other than default), what it was trained on, metrics.
    """
    from safetensors.torch import save

    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(net).__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    sizes = defaults | dict(getattr(net, "sizes", {})) | dict(about.get("net", {}))
    contents = {"format": FORMAT, "method": method.info.name, "model": asdict(shape), **about, "net": sizes}
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {name: rows.detach().cpu().contiguous() for name, rows in net.state_dict().items()}
    _write(folder / PARAMETERS, save(parameters))
    _write(folder / ABOUT, (json.dumps(contents, indent=1) + "\n").encode())


def _new(method: TrainedMethod, shape: ModelShape, llm: Any, sizes: Mapping[str, Any] | None = None) -> nn.Module:
    source = {"llm": llm} if method.copies_layers else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # "random" weights are the same ones each time
        return method.make_net(shape, **source, **(sizes or {})).float().eval().requires_grad_(False)


def _words(shape: ModelShape) -> str:
    return f"{shape.type} of width {shape.width} with {shape.layers} LLM layers"


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
