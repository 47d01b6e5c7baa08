"""Run functions of the authors' repositories alone: taken from their files by name, without the imports of the file."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parent


def functions(file: Path, *names: str, **known: Any) -> dict[str, Any]:
    """Return the functions ``names`` of a file, also those of its classes; ``known`` are the names that they read."""
    found = [n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.FunctionDef)]
    chosen = [next(node for node in found if node.name == name) for name in names]
    module = ast.fix_missing_locations(ast.Module(chosen, type_ignores=[]))
    space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "nn": torch.nn, **known}
    exec(compile(module, str(file), "exec"), space)
    return {name: space[name] for name in names}


def write(name: str, entries: list[dict[str, Any]], tensors: dict[str, Tensor], about: str) -> None:
    """Write the outputs ``{"method/case/tensor": rows}`` and the manifest of their methods."""
    for entry in entries:
        entry["file"] = f"{name}.safetensors"
        for case in entry["cases"]:
            prefix = f"{entry['method']}/{case['case']}/"
            case["inputs"] = {}
            case["outputs"] = {key.removeprefix(prefix): key for key in tensors if key.startswith(prefix)}
    manifest = {
        "set": name,
        "precision": f"float32, CPU, torch {torch.__version__.split('+')[0]}, one thread",
        "key_format": "<method>/<case>/<tensor>",
        "inputs": about,
        "methods": entries,
    }
    (GOLDEN / f"manifest-{name}.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    save_file({key: rows.contiguous() for key, rows in tensors.items()}, GOLDEN / f"{name}.safetensors")
    print(f"{len(tensors)} tensors of {len(entries)} methods", file=sys.stderr)
