"""What each family of models looks like: where the tower is, what its rows mean, how patches become visual tokens."""

from tokensieve.models.family import Family, families, family_of
from tokensieve.models.fusion import FusionFamily, fusion_families, is_fusion, longest_text

__all__ = ["Family", "FusionFamily", "families", "family_of", "fusion_families", "is_fusion", "longest_text"]
