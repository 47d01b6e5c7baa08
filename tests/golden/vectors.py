"""The authors' own numbers: inputs and outputs of the official codes on small random inputs, and at published sizes.

The manifests beside this file name the repository, the commit and the law of every case. The inputs at published sizes
are drawn by ``drawn.py``; only the outputs are stored.
"""

import json
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent
TOLERANCE = 3e-5
CLOSE = {"atol": TOLERANCE, "rtol": TOLERANCE}
Tensors = dict[str, Tensor]


@cache
def entries() -> dict[str, dict]:
    """Return the entry of every method's vectors, of all manifests."""
    manifests = [json.loads(file.read_text()) for file in sorted(FOLDER.glob("manifest*.json"))]
    return {entry["method"]: entry for manifest in manifests for entry in manifest["methods"]}


def cases(method: str):
    """Run a test on each case of a method, by its ``name``."""
    return pytest.mark.parametrize("name", [case["case"] for case in entries()[method]["cases"]])


def load(method: str, name: str) -> tuple[Tensors, Tensors, dict]:
    """Return inputs, outputs and hyperparameters of one case."""
    stored = load_file(FOLDER / entries()[method]["file"])
    case = next(case for case in entries()[method]["cases"] if case["case"] == name)

    def tensors(side: str) -> Tensors:
        keys = {key: where["key"] if isinstance(where, dict) else where for key, where in case[side].items()}
        return {key: stored[where] for key, where in keys.items()}

    prefix = f"{name}/in/"  # a recorded state dict is not listed in the manifest
    weights = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(f"{prefix}sd.")}
    return weights | tensors("inputs"), tensors("outputs"), case["hyperparameters"]


def split_weights(inputs: Tensors) -> tuple[Tensors, Tensors]:
    """Separate the inputs of a module from its recorded state dict."""
    weights = {key.removeprefix("sd."): value for key, value in inputs.items() if key.startswith("sd.")}
    return {key: value for key, value in inputs.items() if not key.startswith("sd.")}, weights
