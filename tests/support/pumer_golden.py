"""The authors' own numbers: inputs and outputs of PuMer's code on small random inputs."""

import json
from pathlib import Path

from safetensors.torch import load_file

from tokensieve import parse

FOLDER = Path(__file__).parents[1] / "golden"
RELEVANCE = {"mean_head": "mean_head", "first_head": "first_head", "k_metric": "key_key", "qk": "query_key"}
CASES = {m["method"]: m for m in json.loads((FOLDER / "manifest-pumer.json").read_text())["methods"]}


def cases(method):
    """Names of a method's cases."""
    return [case["case"] for case in CASES[method]["cases"]]


def load(method, name):
    """Hyperparameters, inputs, outputs and state dict of one case."""
    entry = CASES[method]
    tensors = load_file(FOLDER / entry["file"])
    (case,) = [case for case in entry["cases"] if case["case"] == name]
    inputs = {key: tensors[value["key"]] for key, value in case["inputs"].items()}
    outputs = {key: tensors[value["key"]] for key, value in case["outputs"].items()}
    weights = {key.removeprefix("sd."): inputs.pop(key) for key in list(inputs) if key.startswith("sd.")}
    return case["hyperparameters"], inputs, outputs, weights


def official(settings, layers):
    """The method with the authors' settings, order and treatment of padding."""
    (method,) = parse(
        "pumer",
        layers=tuple(layers),
        prune=settings["prune_r"],
        merge=settings["merge_r"],
        merge_text=settings["merge_text"],
        relevance=RELEVANCE[settings.get("sim_method", "mean_head")],
        official_order=True,
        official_padding=True,
    )
    return method
