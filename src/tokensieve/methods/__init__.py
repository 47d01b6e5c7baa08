"""Hold one file per method: a frozen dataclass whose ``reduce`` turns visual tokens into a Reduction."""

from tokensieve.methods.base import ConnectorMethod, Method, MethodInfo, Positions, Repair, ScoreMethod, Stage
from tokensieve.methods.fusion import FusionMethod
from tokensieve.methods.needs import DecoderNeeds, EncoderNeeds, Needs, StageNeeds
from tokensieve.methods.registry import info, list_methods, register
from tokensieve.methods.spec import parse
from tokensieve.methods.stages import DecoderMethod, EncoderMethod, PixelMethod, ResizeMethod
from tokensieve.methods.trained import ModelShape, TrainedMethod, heads_of

__all__ = [
    "ConnectorMethod",
    "DecoderMethod",
    "DecoderNeeds",
    "EncoderMethod",
    "EncoderNeeds",
    "FusionMethod",
    "Method",
    "MethodInfo",
    "ModelShape",
    "Needs",
    "PixelMethod",
    "Positions",
    "Repair",
    "ResizeMethod",
    "ScoreMethod",
    "Stage",
    "StageNeeds",
    "TrainedMethod",
    "heads_of",
    "info",
    "list_methods",
    "parse",
    "register",
]
