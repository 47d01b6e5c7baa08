"""Attach any published visual-token reduction method to an unmodified Hugging Face vision-language model.

The public names are imported on first use, so that ``tokensieve --help`` does not pay for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tokensieve.version import __version__

if TYPE_CHECKING:
    from tokensieve.attach import Sieve, attach
    from tokensieve.methods import Method, MethodInfo, Needs, methods, parse, register
    from tokensieve.reduction import Reduction
    from tokensieve.tokens import VisualTokens

__all__ = [
    "Method",
    "MethodInfo",
    "Needs",
    "Reduction",
    "Sieve",
    "VisualTokens",
    "__version__",
    "attach",
    "methods",
    "parse",
    "register",
]

_HOME = {
    "attach": ("attach", "Sieve"),
    "methods": ("Method", "MethodInfo", "Needs", "methods", "parse", "register"),
    "reduction": ("Reduction",),
    "tokens": ("VisualTokens",),
}


class _Package(ModuleType):
    """This package, with lazy names: a property wins over the submodule of the same name (``attach``, ``methods``)."""


def _lazy(home: str, name: str) -> property:
    def get(self: ModuleType) -> Any:
        return getattr(import_module(f"tokensieve.{home}"), name)

    return property(get, lambda self, submodule: None)


for _home, _names in _HOME.items():
    for _name in _names:
        setattr(_Package, _name, _lazy(_home, _name))
sys.modules[__name__].__class__ = _Package
