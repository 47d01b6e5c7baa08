"""Store outputs of the authors' code and their manifest, for the ``make_*.py`` scripts beside this file."""

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).parent
Case = tuple[str, dict[str, Any], dict[str, Tensor]]  # name, hyperparameters, outputs


def package(name: str, folder: Path) -> None:
    """Make a folder importable as a package without running its ``__init__``, which imports the authors' models."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]  # type: ignore[attr-defined]
    sys.modules[name] = module


def functions(file: Path, *names: str, **needed: Any) -> types.SimpleNamespace:
    """Run only these definitions of a file, with ``needed`` as its globals: its imports are left out."""
    ast = importlib.import_module("ast")
    tree = ast.parse(file.read_text("utf-8"))
    tree.body = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    scope = {"torch": torch, **needed}
    exec(compile(tree, str(file), "exec"), scope)
    return types.SimpleNamespace(**{name: scope[name] for name in names})


def commit(checkout: Path) -> str:
    """Return the commit of a checkout."""
    return subprocess.check_output(["git", "-C", str(checkout), "rev-parse", "HEAD"], text=True).strip()


def store(name: str, entries: list[dict[str, Any]], cases: dict[str, list[Case]]) -> None:
    """Write ``<name>.safetensors`` and ``manifest-<name>.json``.

    Args:
        entries: what the manifest says of each method, without its cases.
        cases: the cases of each method.
    """
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        method, entry["file"], entry["cases"] = entry["method"], f"{name}.safetensors", []
        for case, hyperparameters, outputs in cases[method]:
            keys = {output: f"{method}/{case}/{output}" for output in outputs}
            tensors |= {keys[output]: tensor.contiguous() for output, tensor in outputs.items()}
            entry["cases"].append({"case": case, "hyperparameters": hyperparameters, "inputs": {}, "outputs": keys})
    save_file(tensors, FOLDER / f"{name}.safetensors")
    head = {
        "set": name,
        "precision": f"float32, CPU, torch {torch.__version__.partition('+')[0]}, one thread",
        "key_format": "<method>/<case>/<tensor>",
        "inputs": "drawn by tests/golden/drawn.py from the seed in the hyperparameters; none are stored",
        "script": f"tests/golden/make_{name}.py",
        "methods": entries,
    }
    (FOLDER / f"manifest-{name}.json").write_text(json.dumps(head, indent=1, ensure_ascii=False) + "\n", "utf-8")
