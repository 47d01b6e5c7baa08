"""The command line that the benchmarks share: common options, and the report as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def parser_of(description: str | None, *, threads: int | None = 2) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads of torch")
    parser.add_argument("--output", type=Path, help="file of the report")
    return parser


def run_script(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Run a benchmark with the arguments of the command line, and write its report."""
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    report = run(args)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n")
