"""Compare methods and budgets on a data set: accuracy with intervals, tokens, and measured costs."""

from tokensieve.errors import DataError, OutputError, ResumeError
from tokensieve.evaluate.compare import compare
from tokensieve.evaluate.data import Sample, load_data
from tokensieve.evaluate.intervals import PairedDifference, tango, wilson
from tokensieve.evaluate.metrics import METRICS
from tokensieve.evaluate.processes import Processes
from tokensieve.evaluate.prompt import decode, encode, encode_pairs
from tokensieve.evaluate.provenance import environment
from tokensieve.evaluate.results import Example, Question, Results, Skipped
from tokensieve.evaluate.rows import Row, TypeScore, VsRandom, YesNo
from tokensieve.images import open_image

__all__ = [
    "METRICS",
    "DataError",
    "Example",
    "OutputError",
    "PairedDifference",
    "Processes",
    "Question",
    "Results",
    "ResumeError",
    "Row",
    "Sample",
    "Skipped",
    "TypeScore",
    "VsRandom",
    "YesNo",
    "compare",
    "decode",
    "encode",
    "encode_pairs",
    "environment",
    "load_data",
    "open_image",
    "tango",
    "wilson",
]
