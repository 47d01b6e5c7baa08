"""Read the tensors of a checkpoint in LLaVA's original format: whole, a LoRA of a base, or a projector for a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from tokensieve.convert.lora import ADAPTER, CONFIG, merge, plain
from tokensieve.errors import Refusal, first_line
from tokensieve.fusion.convert.read import read_tensors

WHOLE = ("model.safetensors", "pytorch_model.bin")  # with ".index.json" behind, in shards
BESIDE = ("non_lora_trainables.bin", "mm_projector.bin", "query_abstractor.bin")  # tensors for a base


def read_checkpoint(source: Path, base: Path | None) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under the authors' names, with those of its base.

    Raises:
        Refusal: if there is no checkpoint, a shard is missing, or a base is missing or of no use.
    """
    files, tuned = weight_files(source), [source / name for name in BESIDE if (source / name).is_file()]
    adapter = next((source / name for name in ADAPTER if (source / name).is_file()), None)
    if files and adapter is None:
        if base is not None:
            raise Refusal(f"--base is for a LoRA or a projector alone; {source} holds a whole model ({files[0].name})")
        return read_files(files)
    if adapter is None and not tuned:
        allowed = ", ".join((*WHOLE, *ADAPTER, *BESIDE))
        raise Refusal(f"no checkpoint at {source}: it has none of {allowed}")
    if base is None:
        kind = "a LoRA" if adapter else f"{tuned[0].name} alone"
        raise Refusal(f"{source} holds {kind}: name the model that it was trained on with --base FOLDER")
    files = weight_files(base)
    if not files:
        raise Refusal(f"no weights at the base {base}: it has none of {', '.join(WHOLE)}")
    weights = read_files(files)
    for file in tuned:
        weights |= plain(read_tensors(file))
    if adapter is not None:
        merge(weights, read_tensors(adapter), read_json(source / CONFIG))
    return weights


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a whole model in a folder, in shards or in one; empty if there are none."""
    for name in WHOLE:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
        if (folder / name).is_file():
            return [folder / name]
    return []


def _shards(index: Path) -> list[Path]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise Refusal(f"{index} is no index of shards: it has no weight_map")
    names = sorted(set(listed.values()))
    foreign = [name for name in names if Path(name).name != name]
    missing = [name for name in names if not (index.parent / name).is_file()]
    if foreign or missing:
        reason = "are not beside it" if foreign else "are missing"
        raise Refusal(f"{index} names {len(foreign or missing)} shards that {reason}: {', '.join(foreign or missing)}")
    return [index.parent / name for name in names]


def read_files(files: list[Path]) -> dict[str, Tensor]:
    """Return the tensors of several files."""
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read_tensors(file)
    return weights


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; refuse what is none."""
    try:
        contents = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise Refusal(f"no {file.name} at {file.parent}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"cannot read {file}: {first_line(error)}") from None
    if not isinstance(contents, dict):
        raise Refusal(f"{file} must hold a JSON object; got {type(contents).__name__}")
    return contents
