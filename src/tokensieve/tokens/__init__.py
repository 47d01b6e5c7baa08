"""The tokens that a method receives: B images of equal size, and only the evidence that the method requested.

Each stage has a type of its own. :class:`ConnectorTokens` are about to enter the LLM, :class:`EncoderTokens` are inside
the vision encoder, and :class:`DecoderTokens` are inside the LLM.
"""

from tokensieve.tokens.base import VisualTokens
from tokensieve.tokens.evidence import ByLayer, DecoderUserText, Layers, Tiles, UserText, given, resolve_layers
from tokensieve.tokens.stages import ConnectorTokens, DecoderTokens, EncoderTokens

__all__ = [
    "ByLayer",
    "ConnectorTokens",
    "DecoderTokens",
    "DecoderUserText",
    "EncoderTokens",
    "Layers",
    "Tiles",
    "UserText",
    "VisualTokens",
    "given",
    "resolve_layers",
]
