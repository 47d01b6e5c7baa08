"""Model families: where the vision encoder is, how its rows map to visual tokens, and what is supported."""

from tokensieve.models.catalogue import families, family_of
from tokensieve.models.family import EncodeCall, Family
from tokensieve.models.generic import REFUSED
from tokensieve.models.layout import TokenLayout

__all__ = ["REFUSED", "EncodeCall", "Family", "TokenLayout", "families", "family_of"]
