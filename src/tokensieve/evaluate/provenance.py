"""Origin of the numbers: the model down to its weights, each sample down to its image, and the machine."""

from __future__ import annotations

import hashlib
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from tokensieve import reference
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.pictures import content_key
from tokensieve.evaluate.plan import Settings
from tokensieve.loading import LoadOptions, device_of, without_folder
from tokensieve.version import __version__

PROBES = 1024  # values read from each weight tensor
PACKAGE = Path(__file__).parents[1]
NO_ANSWERS = ("check", "cli.py", "commands", "measure", "report", "train", "tune")  # code that changes no answer


def model_name(model: Any) -> str:
    """Return the model's hub name, the last part of its path, or its class."""
    return without_folder(str(getattr(model.config, "name_or_path", "") or type(model).__name__))


def is_bundled(model: Any) -> bool:
    """Return whether the model was loaded from the weights of a bundled one."""
    name = str(getattr(model.config, "name_or_path", ""))
    return bool(name) and Path(name).resolve() in {reference.path(known).resolve() for known in reference.NAMES}


def model_identity(model: Any) -> dict[str, str]:
    """Return architecture, dtype, attention implementation and digests of config and weights.

    The weights' digest reads names, shapes and up to :data:`PROBES` values of every tensor: any training changes it,
    and it takes no time on large models.
    """
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {list(tensor.shape)}".encode())
        stored = _offloaded(model, name) if tensor.is_meta else tensor
        if stored is not None:
            flat = stored.detach().flatten()
            weights.update(flat[:: max(1, flat.numel() // PROBES)].to("cpu", torch.float32).numpy().tobytes())
    return {
        "architecture": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
    }


def _offloaded(model: Any, name: str) -> torch.Tensor | None:
    """Return a weight that accelerate keeps outside the module, on the CPU or on disk; ``None`` if there is none."""
    module, _, attribute = name.rpartition(".")
    hook = getattr(model.get_submodule(module), "_hf_hook", None)
    stored = getattr(hook, "weights_map", None)
    return None if stored is None else stored[attribute]


def code_digest(package: Path = PACKAGE) -> str:
    """Return a digest of the code that answers depend on: after an edit, older answers are not reused."""
    files = sorted(path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in NO_ANSWERS)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def processor_identity(processor: Any) -> str:
    """Return a digest of the processor's settings and of its chat template: both decide the tokens of a prompt."""
    text = f"{processor.to_json_string()}{getattr(processor, 'chat_template', None)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def predictions_setup(model: Any, processor: Any, settings: Settings) -> dict[str, Any]:
    """Return all that two calls must have in common to share the answers of a model."""
    versions = {"tokensieve": __version__, "code": code_digest(), "processor": processor_identity(processor)}
    return versions | settings.prediction_setup() | model_identity(model)


def loading_facts(model: Any, options: LoadOptions) -> dict[str, Any]:
    """Return how the model was loaded: the options set by the user, and the commit of a model from the hub."""
    commit = getattr(model.config, "_commit_hash", None)
    return options.to_json() | ({} if commit is None else {"commit": commit})


def sample_key(sample: Sample) -> str:
    """Return the sample's id and a digest of its text and of the content of its images, whatever their names."""
    contents = [key for key in map(content_key, sample.images) if key is not None]
    digest = hashlib.sha256(json.dumps([sample.text, *contents, *sample.turns]).encode()).hexdigest()[:8]
    return f"{sample.id} {digest}"


def environment(model: Any) -> dict[str, Any]:
    """Return versions, hardware, threads, dtype, attention implementation and the date (UTC); no host and no path."""
    device = device_of(model)
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    return {
        "tokensieve": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        **gpu,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _cpu() -> str:
    """Return the processor's name, or its architecture if the system gives no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
