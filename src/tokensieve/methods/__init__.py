"""One file per method. A method is a frozen dataclass whose ``reduce`` turns visual tokens into a Reduction."""

from tokensieve.methods.base import DecoderMethod, EncoderMethod, Method, MethodInfo, Needs, Positions, Stage
from tokensieve.methods.fusion import FusionMethod
from tokensieve.methods.registry import info, list_methods, register
from tokensieve.methods.spec import parse

__all__ = [
    "DecoderMethod",
    "EncoderMethod",
    "FusionMethod",
    "Method",
    "MethodInfo",
    "Needs",
    "Positions",
    "Stage",
    "info",
    "list_methods",
    "parse",
    "register",
]
