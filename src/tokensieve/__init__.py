"""Attach any published visual-token reduction method to an unmodified Hugging Face vision-language model.

The public names are imported on first use (PEP 562), so that ``tokensieve --help`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tokensieve.errors import Refusal
from tokensieve.version import __version__

if TYPE_CHECKING:
    from tokensieve.engine import Sieve, attach
    from tokensieve.methods import Method, MethodInfo, Needs, list_methods, parse, register
    from tokensieve.reduction import Reduction
    from tokensieve.tokens import VisualTokens

__all__ = [
    "Method",
    "MethodInfo",
    "Needs",
    "Reduction",
    "Refusal",
    "Sieve",
    "VisualTokens",
    "__version__",
    "attach",
    "list_methods",
    "parse",
    "register",
]

_MODULE_OF = {
    "Method": "methods",
    "MethodInfo": "methods",
    "Needs": "methods",
    "Reduction": "reduction",
    "Sieve": "engine",
    "VisualTokens": "tokens",
    "attach": "engine",
    "list_methods": "methods",
    "parse": "methods",
    "register": "methods",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
