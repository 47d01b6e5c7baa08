"""Nets of checkpoints that authors published, as folders that ``weights=`` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokensieve.errors import Refusal, first_line
from tokensieve.loading.options import DEFAULTS, LoadOptions
from tokensieve.loading.place import find, from_pretrained
from tokensieve.methods import TrainedMethod, parse


def convert_net(spec: str, source: Path, target: Path, model: str, options: LoadOptions = DEFAULTS) -> Any:
    """Store the net of an author's checkpoint as a folder of :func:`~tokensieve.engine.nets.save_net`; return the net.

    Args:
        spec: the method, such as "mqt".
        source: the authors' checkpoint: a folder, also of several files, or one file of weights.
        target: the new folder.
        model: the model that the net is for: a bundled one, a folder, or a hub name. Its weights are not loaded.

    Raises:
        Refusal: the checkpoint has no such net, or one for another model, or reading it would run code from it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from tokensieve.engine.nets import save_net, shape_of

    stages = parse(spec)
    method = stages[0]
    if len(stages) > 1 or not isinstance(method, TrainedMethod) or method.published is None:
        raise Refusal(f"no published nets of {spec} can be read; they are known of methods such as mqt, tokenpacker")
    config = from_pretrained(AutoConfig, find(model, options.revision), options)
    with torch.device("meta"):  # the shapes alone
        empty = AutoModelForImageTextToText.from_config(config)
    shape = shape_of(empty)
    parameters = _parameters(source, method.published)
    sizes = {size: len(parameters[name]) for size, name in method.published_sizes.items() if name in parameters}
    net = method.make_net(shape, **sizes)
    try:
        net.load_state_dict(parameters)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()  # the first line names the class alone
        raise Refusal(f"{source} has no net of {method.info.name} for {model}: {reason}") from None
    save_net(target, method, shape, net, {"net": sizes, "source": source.name})
    return net


def _parameters(source: Path, prefix: str) -> dict[str, Any]:
    """Return the parameters whose names start with ``prefix``, without it; "model." before it is left out."""
    from tokensieve.fusion.convert.read import read_weights

    files = [source]
    for index in sorted(source.glob("*.index.json")):  # which of several files has each parameter
        try:
            places = json.loads(index.read_text("utf-8"))["weight_map"].items()
            files = sorted({source / Path(file).name for name, file in places if prefix in name})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise Refusal(f"cannot read {index}: {first_line(error)}") from None
    weights = {name: rows for file in files for name, rows in read_weights(file).items()}
    parameters = {name.removeprefix(prefix): rows for name, rows in weights.items() if name.startswith(prefix)}
    if not parameters:
        raise Refusal(f"{source} has no parameters whose names start with {prefix!r}")
    return parameters
