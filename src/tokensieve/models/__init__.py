"""What each family of models looks like: where the tower is, what its rows mean, how patches become visual tokens."""

from tokensieve.models.catalogue import TESTED, families, family_of
from tokensieve.models.family import EncodeCall, Family
from tokensieve.models.fusion import FusionFamily, fusion_families, is_fusion, longest_text
from tokensieve.models.generic import REFUSED
from tokensieve.models.shape import Shape

__all__ = [
    "REFUSED",
    "TESTED",
    "EncodeCall",
    "Family",
    "FusionFamily",
    "Shape",
    "families",
    "family_of",
    "fusion_families",
    "is_fusion",
    "longest_text",
]
