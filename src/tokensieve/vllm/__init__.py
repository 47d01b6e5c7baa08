"""Connector methods inside an unforked vLLM, as a plug-in.

vLLM calls :func:`register` in each of its processes (entry point ``vllm.general_plugins``). Nothing changes for a
model until an engine is started with :func:`engine_options`. An engine's frontend then promises the number of
placeholders of each image (``processor.py``), and its worker keeps that number of rows (``model.py``). ``families``
declares the model families, ``settings.py`` the choices, and ``plan.py`` what one half tells the other.

This file and ``families`` import neither torch nor vLLM: a frontend without a model loads them, too.
"""

from __future__ import annotations

from typing import Any

__all__ = ["checkpoint", "engine_options", "placeholders", "register", "renders_begin_of_text"]


def register() -> None:
    """Make the reduced architectures known to vLLM. A second call changes nothing."""
    from vllm import ModelRegistry

    from tokensieve.vllm.families import FAMILIES
    from tokensieve.vllm.orphans import end_with_parent

    end_with_parent()
    known = ModelRegistry.get_supported_archs()
    for family in FAMILIES:
        if family.reduced_architecture not in known:
            ModelRegistry.register_model(
                family.reduced_architecture, f"tokensieve.vllm.model:{family.reduced_architecture}"
            )


def __getattr__(name: str) -> Any:
    if name in __all__:  # they import torch and transformers, which register() does without
        from tokensieve.vllm import settings

        return getattr(settings, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
