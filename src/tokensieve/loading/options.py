"""The options that a model is loaded with, and the checks of their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from tokensieve.errors import MissingExtra, Refusal, first_line

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
Quantize: TypeAlias = Literal["4bit", "8bit"]
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_choice(option: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a value that is not among the allowed ones."""
    if value not in allowed:
        raise Refusal(f"{option} must be one of {', '.join(allowed)}; got {value!r}")


@dataclass(frozen=True)
class LoadOptions:
    """Set how a model and its processor are loaded. The defaults load a checkpoint as its authors saved it.

    Attributes:
        dtype: precision of the weights; "auto" is the checkpoint's on a GPU, float32 elsewhere.
        device: a torch device such as "cpu" or "cuda:1"; "auto" is a GPU if there is one.
        device_map: spread the model over devices with accelerate: "auto", "balanced", "balanced_low_0", "sequential",
            or {module name: device, "cpu" or "disk"}. It takes the place of ``device``.
        attn: attention implementation of transformers: "sdpa", "eager", "flash_attention_2", "flex_attention"….
            ``None`` leaves the choice to transformers.
        revision: branch, tag or commit of a model on the hub.
        quantize: "4bit" (NF4) or "8bit" weights, quantised by bitsandbytes while they are loaded.
        trust_remote_code: allow code that comes with the checkpoint to run.
        adapter: folder or hub name of a PEFT adapter, or a bundled one's, put on the model and not merged.
        processor: arguments for the processor and its image processor, such as ``{"max_pixels": 401408}``.
        chat: variables of the chat template, such as ``{"enable_thinking": False}``.
        system: system prompt, put before every conversation.

    Raises:
        Refusal: an unknown value, or options that exclude each other.
    """

    dtype: Dtype = "auto"
    device: str = "auto"
    device_map: str | Mapping[str, Any] | None = None
    attn: str | None = None
    revision: str | None = None
    quantize: Quantize | None = None
    trust_remote_code: bool = False
    adapter: str | None = None
    processor: Mapping[str, Any] = field(default_factory=dict)
    chat: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, get_args(Dtype))
        if self.quantize is not None:
            check_choice("quantize", self.quantize, get_args(Quantize))
        if isinstance(self.device_map, str):
            check_choice("device_map", self.device_map, DEVICE_MAPS)
        if self.device_map is not None and self.device != "auto":
            raise Refusal(f"give a device or a device_map, not both; got {self.device!r} and {self.device_map!r}")

    def to_json(self) -> dict[str, Any]:
        """Return the options that differ from the defaults; an adapter's folder is named by its last part only."""
        default = LoadOptions()
        options = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        if self.adapter is not None:
            options["adapter"] = without_folder(self.adapter)
        return options


DEFAULTS = LoadOptions()


def without_folder(name: str) -> str:
    """Return a hub name as it is, and the last part of a path: results name no folder of the machine."""
    return Path(name).resolve().name if Path(name).exists() else name


def check_environment(options: LoadOptions) -> None:
    """Refuse, before anything is read, options whose packages are not installed and attention that is unknown."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from tokensieve.engine.probe import NAME as PROBE

    packages = {
        "quantize": ("bitsandbytes", "quantising", "quantize"),
        "device_map": ("accelerate", "a device map", "train"),
        "adapter": ("peft", "an adapter", "peft"),
    }
    for option, (package, purpose, extra) in packages.items():
        if getattr(options, option) is not None and find_spec(package) is None:
            raise MissingExtra(f"{purpose} needs {package}", extra)
    if options.attn is not None and "/" not in options.attn:  # with a slash it is a kernel of the hub
        # not the engine's probe, nor kernels for continuous batching
        names = {name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if name != PROBE and "|" not in name}
        check_choice("attn", options.attn, sorted({"eager", *names}))


def torch_device(options: LoadOptions) -> Any:
    """Return the torch device; refuse a name that torch does not know, and a device that is not there."""
    import torch

    if options.device == "auto":
        # by its number: each of several processes has selected one
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).item()  # also refuses the device "meta", which holds no numbers
    except Exception as error:  # a name in no form that torch knows, a missing driver: several types
        raise Refusal(
            f"device must be auto, cpu, cuda, cuda:1 or another device of torch that is there; got {options.device!r} "
            f"({first_line(error)})"
        ) from error
    return device


def torch_dtype(options: LoadOptions, device: Any) -> Any:
    """Return a torch dtype, or "auto": the checkpoint's."""
    import torch

    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    return torch.float32 if device.type == "cpu" else "auto"
