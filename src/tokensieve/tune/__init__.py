"""Search the cheapest reduction that keeps the accuracy on your questions, and prove it on held-out ones."""

from tokensieve.tune.result import Finalist, TuneResult, Verdict
from tokensieve.tune.search import tune
from tokensieve.tune.space import Candidate, space

__all__ = ["Candidate", "Finalist", "TuneResult", "Verdict", "space", "tune"]
