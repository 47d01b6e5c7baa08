"""The authors' own numbers: inputs and outputs of the official codes, by method and case."""

import json
from functools import cache
from pathlib import Path

from safetensors.torch import load_file

FOLDER = Path(__file__).parent.parent / "golden"
TOLERANCE = 3e-5


@cache
def manifest():
    return {m["method"]: m for m in json.loads((FOLDER / "manifest-zoo.json").read_text())["methods"]}


def names(method):
    return [case["case"] for case in manifest()[method]["cases"]]


@cache
def case(method, name):
    """(inputs, outputs, hyperparameters) of one case."""
    tensors = load_file(FOLDER / f"{method}.safetensors")
    found = next(c for c in manifest()[method]["cases"] if c["case"] == name)
    inputs, outputs = (
        {key: tensors[where["key"]] for key, where in found[side].items()} for side in ("inputs", "outputs")
    )
    return inputs, outputs, found["hyperparameters"]
