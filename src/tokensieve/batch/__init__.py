"""Answer many rows on Ray Data: on one machine or a cluster, each row exactly once, resumably."""

from tokensieve.batch.job import Job
from tokensieve.batch.parts import Totals
from tokensieve.batch.rounds import Place, run

__all__ = ["Job", "Place", "Totals", "run"]
