"""Accuracy of many methods and budgets on a data set, beside what they cost."""

from tokensieve.errors import DataError, OutputError, ResumeError
from tokensieve.evaluate.compare import compare
from tokensieve.evaluate.data import Sample, load_data
from tokensieve.evaluate.environment import environment
from tokensieve.evaluate.images import open_image
from tokensieve.evaluate.intervals import bootstrap, wilson
from tokensieve.evaluate.metrics import METRICS
from tokensieve.evaluate.prompt import decode, encode, encode_pairs
from tokensieve.evaluate.results import Example, Results, Row, TypeScore, VsRandom

__all__ = [
    "METRICS",
    "DataError",
    "Example",
    "OutputError",
    "Results",
    "ResumeError",
    "Row",
    "Sample",
    "TypeScore",
    "VsRandom",
    "bootstrap",
    "compare",
    "decode",
    "encode",
    "encode_pairs",
    "environment",
    "load_data",
    "open_image",
    "wilson",
]
