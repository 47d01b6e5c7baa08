"""Find the model inside a wrapper of PEFT or of torch.compile."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

from tokensieve.errors import Refusal

PEFT = "0.21"  # earlier releases call the forward of the wrapped model directly, past its hooks


def unwrapped(model: Any) -> Any:
    """Return the model inside a PEFT or a compiled model, whose calls run its hooks. Return others as they are.

    Raises:
        Refusal: virtual tokens in front of the prompt, or a release of PEFT that passes hooks by.
    """
    model = uncompiled(model)
    if not hasattr(model, "get_base_model"):
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        kinds = ", ".join(str(config.peft_type.value) for config in model.peft_config.values())
        raise Refusal(f"{kinds} puts virtual tokens in front of the prompt, which is not supported; LoRA is")
    if Version(_installed()) < Version(PEFT):
        raise Refusal(f"peft {_installed()} runs a model past its hooks; install peft>={PEFT}")
    return uncompiled(model.get_base_model())


def uncompiled(module: Any) -> Any:
    """Return the module that ``torch.compile(module)`` runs, hooks included; others as they are."""
    return getattr(module, "_orig_mod", module)


def _installed() -> str:
    try:
        return version("peft")
    except PackageNotFoundError:  # a wrapper of another origin
        return PEFT
