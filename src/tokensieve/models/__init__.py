"""What each family of models looks like: where the vision encoder is, what its rows mean, how patches become tokens."""

from tokensieve.models.catalogue import TESTED, families, family_of
from tokensieve.models.family import EncodeCall, Family
from tokensieve.models.generic import REFUSED
from tokensieve.models.layout import TokenLayout

__all__ = ["REFUSED", "TESTED", "EncodeCall", "Family", "TokenLayout", "families", "family_of"]
