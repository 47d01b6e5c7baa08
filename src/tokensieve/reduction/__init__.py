"""The decision of a method: which visual tokens are kept, and which tokens are merged into them."""

from tokensieve.reduction.decision import Reduction
from tokensieve.reduction.mixing import Mixing

__all__ = ["Mixing", "Reduction"]
