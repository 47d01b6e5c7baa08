"""The only package that hooks a live model."""

from tokensieve.engine.sieve import Sieve, attach

__all__ = ["Sieve", "attach"]
