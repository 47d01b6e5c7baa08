"""What each family of models looks like: where the tower is, what its rows mean, how patches become visual tokens."""

from tokensieve.models.family import Family, families, family_of

__all__ = ["Family", "families", "family_of"]
