"""Read the weights and the settings of the authors' checkpoints."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tokensieve.errors import Refusal

FILES = ("model.safetensors", "pytorch_model.bin")


def read_weights(source: Path) -> dict[str, Tensor]:
    """Read the state dict in a file (.bin, .pt, .ckpt, .safetensors), or in a folder with such a file.

    Raises:
        Refusal: if there is none, or if reading it would run code from the file.
    """
    file = next((source / name for name in FILES if (source / name).is_file()), source)
    if not file.is_file():
        reason = f"no {' or '.join(FILES)} in this folder" if source.is_dir() else "no such file"
        raise Refusal(f"no checkpoint at {source}: {reason}")
    return {name.removeprefix("model."): t for name, t in read_tensors(file).items()}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one file by their names; where its format allows, they stay on the disk until used.

    Raises:
        Refusal: if it holds anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(file)
            return tensors
        # files of before torch 1.6 are no zip archives and are read whole
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError as error:
        raise Refusal(f"the checkpoint {file} cannot be read: {error.strerror or error}") from error
    except MemoryError:
        raise
    except Exception as error:
        # The unpickler takes any bytes for instructions and fails with many types. torch's own words advise to load the
        # file in a way that runs code from it.
        raise Refusal(
            f"the checkpoint {file} cannot be read: it is no safetensors file and no state dict of tensors alone, "
            "saved by torch.save; other objects are not loaded, because that would run code from the file"
        ) from error
    weights = stored.get("state_dict", stored) if isinstance(stored, dict) else stored
    if isinstance(weights, dict):  # modules may be stored one by one, each with a state dict of its own
        parts = {name: part if isinstance(part, dict) else {"": part} for name, part in weights.items()}
        weights = {f"{name}.{n}" if n else name: t for name, part in parts.items() for n, t in part.items()}
    if not isinstance(weights, dict) or not all(
        isinstance(n, str) and isinstance(t, Tensor) for n, t in weights.items()
    ):
        raise Refusal(f"{file} holds no state dict: names and tensors are expected")
    return weights


def read_settings(source: Path) -> dict[str, Any]:
    """Read the authors' ``config.json`` beside the weights; empty without one."""
    file = (source if source.is_dir() else source.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise Refusal(f"{file} is not JSON: {error}") from error
    return settings if isinstance(settings, dict) else {}
