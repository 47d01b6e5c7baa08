"""Find a model by the user's name, and read a part of it with one clear line when that fails."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokensieve.errors import Refusal, first_line
from tokensieve.loading.options import LoadOptions


@dataclass(frozen=True)
class Place:
    """Path or hub name of a model.

    Attributes:
        revision: branch, tag or commit on the hub.
        unreachable: the hub's error, after which only the local cache is searched.
    """

    path: str
    revision: str | None = None
    unreachable: str = ""


def find(name: str, revision: str | None = None) -> Place:
    """Resolve the user's name: a bundled model, a folder, or a model on the hub."""
    from tokensieve.reference import NAMES
    from tokensieve.reference import path as bundled

    path = Path(os.path.expanduser(name))
    if (name in NAMES or name.startswith("reference")) and not path.exists():
        path = bundled(name)
    if not path.exists() and may_be_hub_name(name):
        return Place(name, revision, unreachable=_hub_refusal(name, revision))
    if not (path / "config.json").is_file():
        missing = "has no config.json" if path.is_dir() else "is not a folder" if path.exists() else "does not exist"
        raise Refusal(f"no model at {name}: it {missing}")
    if revision is not None:
        raise Refusal(f"a revision is chosen for a model on the hub; {name} is a folder, got revision {revision!r}")
    return Place(str(path))


def may_be_hub_name(name: str) -> bool:
    """Return whether a name has the form of one on the hub: ``organisation/name``."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _hub_refusal(name: str, revision: str | None) -> str:
    """Return the hub's error, after one quick request: without a network, loading would retry for half a minute."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except Exception as error:  # no network, no such model, no permission: many types from several libraries
        return first_line(error)
    return ""


def refuse_original_format(place: Place) -> None:
    """Refuse a folder in LLaVA's original format, and name the command that converts it."""
    file = Path(place.path) / "config.json"
    try:
        settings = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return  # transformers says what is wrong with it
    if isinstance(settings, dict) and "mm_vision_tower" in settings and "vision_config" not in settings:
        raise Refusal(
            f"{place.path} is in LLaVA's original format; convert it: tokensieve convert llava {place.path} NEW_FOLDER"
        )


def from_pretrained(loader: Any, place: Place, options: LoadOptions, **arguments: Any) -> Any:
    """Call the ``from_pretrained`` of a class; refuse in one line what it cannot read."""
    if place.revision is not None:
        arguments["revision"] = place.revision
    # an explicit False: without a value, transformers would ask on the terminal
    arguments |= {"local_files_only": bool(place.unreachable), "trust_remote_code": options.trust_remote_code}
    try:
        return loader.from_pretrained(place.path, **arguments)
    except Exception as error:  # broken model files raise many types
        if "trust_remote_code=True" in str(error):
            raise Refusal(
                f"the model {place.path} runs code that comes with it; read that code, then allow it with "
                "--trust-remote-code (trust_remote_code=True)"
            ) from error
        if place.unreachable:
            why = f"it is no folder, it is not in the local cache, and the hub does not answer ({place.unreachable})"
            raise Refusal(f"no model {_at(place)}: {why}") from error
        raise Refusal(f"the model {_at(place)} does not load: {first_line(error)}") from error


def _at(place: Place) -> str:
    return place.path if place.revision is None else f"{place.path} at revision {place.revision!r}"
