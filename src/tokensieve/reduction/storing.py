"""The fields of a reduction as JSON and as a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokensieve.errors import Refusal
from tokensieve.reduction.mixing import Mixing

if TYPE_CHECKING:
    from tokensieve.reduction.decision import Reduction

ENTRY = ("slot", "source", "weight")


def to_json(decision: Reduction) -> dict[str, Any]:
    """Convert a decision to lists and numbers, without its scores and rows made by a net."""
    out: dict[str, Any] = {"total": decision.total, "anchors": decision.anchors.tolist()}
    if decision.mixing is not None:
        out["mixing"] = {name: getattr(decision.mixing, name).tolist() for name in ENTRY}
    if decision.valid is not None:
        out["valid"] = decision.valid.tolist()
    if decision.grid is not None:
        out["grid"] = list(decision.grid)
    if decision.notes:
        out["notes"] = list(decision.notes)
    if not decision.projected:
        out["projected"] = False
    if decision.rows is not None:
        out["made"] = True
    if decision.added:
        out["added"] = decision.added
    return out


def from_json(data: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a decision from the result of :func:`to_json`, not yet compared with each other.

    Raises:
        Refusal: if ``data`` is something else.
    """
    try:
        mixing, anchors = data.get("mixing"), torch.tensor(data["anchors"], dtype=torch.int64)
        return {
            "total": int(data["total"]),
            "anchors": anchors,
            "mixing": mixing
            and Mixing(
                torch.tensor(mixing["slot"], dtype=torch.int64),
                torch.tensor(mixing["source"], dtype=torch.int64),
                torch.tensor(mixing["weight"], dtype=torch.float32),
            ),
            "valid": torch.tensor(data["valid"], dtype=torch.bool) if "valid" in data else None,
            "grid": (data["grid"][0], data["grid"][1]) if "grid" in data else None,
            "notes": tuple(data.get("notes", ())),
            "projected": data.get("projected", True),
            "rows": torch.empty(*anchors.shape, 0) if data.get("made") else None,
            "added": int(data.get("added", 0)),
        }
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise Refusal(f"this is not the JSON of Reduction.to_json ({detail})") from error


def save(decision: Reduction, path: str | Path) -> None:
    """Write a decision to a safetensors file, including its scores and rows made by a net."""
    from safetensors.torch import save_file  # here: torch alone suffices for everything else

    tensors = {name: getattr(decision, name) for name in ("anchors", "valid", "scores", "rows")}
    if decision.mixing is not None:
        tensors |= {name: getattr(decision.mixing, name) for name in ENTRY}
    named = {name: getattr(decision, name) for name in ("total", "grid", "notes", "projected", "added")}
    meta = {name: json.dumps(value) for name, value in named.items()}
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items() if v is not None}, path, metadata=meta)


def load(path: str | Path) -> dict[str, Any]:
    """Return the fields of a decision from a file that :func:`save` wrote, not yet compared with each other.

    Raises:
        Refusal: if it is another file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            tensors, meta = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118 (not a dict)
    except OSError as error:
        raise Refusal(f"{path} cannot be read ({error.strerror or error})") from None
    except SafetensorError:
        raise Refusal(f"{path} is not a file of Reduction.save: not in the safetensors format") from None
    if "anchors" not in tensors or "total" not in meta:
        raise Refusal(f"{path} is not a file of Reduction.save: it holds other tensors")
    try:
        grid = json.loads(meta["grid"])
        return {
            "total": int(meta["total"]),
            "anchors": tensors["anchors"],
            "mixing": Mixing(*(tensors[name] for name in ENTRY)) if "slot" in tensors else None,
            "valid": tensors.get("valid"),
            "scores": tensors.get("scores"),
            "grid": grid and (grid[0], grid[1]),
            "notes": tuple(json.loads(meta["notes"])),
            "projected": json.loads(meta.get("projected", "true")),
            "rows": tensors.get("rows"),
            "added": int(json.loads(meta.get("added", "0"))),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(f"{path} is not a file of Reduction.save: {type(error).__name__}: {error}") from error
