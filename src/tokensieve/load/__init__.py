"""Load on OpenAI-compatible servers: requests per second and latency, full against reduced, in interleaved rounds."""

from tokensieve.load.cells import Cell, grid, parse_sizes
from tokensieve.load.client import Reply, Side
from tokensieve.load.figures import CellResult, break_even_sentences, result_of
from tokensieve.load.probe import base_url, probe, reads_budgets, same_fields
from tokensieve.load.rounds import Journal, Plan, Record, measure
from tokensieve.load.servers import Launch, launched, launches
from tokensieve.load.traffic import Outcome, arrivals, closed_loop, open_loop

__all__ = [
    "Cell",
    "CellResult",
    "Journal",
    "Launch",
    "Outcome",
    "Plan",
    "Record",
    "Reply",
    "Side",
    "arrivals",
    "base_url",
    "break_even_sentences",
    "closed_loop",
    "grid",
    "launched",
    "launches",
    "measure",
    "open_loop",
    "parse_sizes",
    "probe",
    "reads_budgets",
    "result_of",
    "same_fields",
]
