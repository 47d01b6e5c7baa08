"""Equivalence checks (laws) on a live model: what must hold no matter which visual tokens a method drops."""

from tokensieve.check.laws import LAWS, Laws, Verdict

__all__ = ["LAWS", "Laws", "Verdict"]
