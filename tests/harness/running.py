"""Run the commands of harnesses, each in a process of its own, and read their answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECS = ("full", "vtc-cls(keep=36)", "trsm(keep=36)", "fastv(keep=36, layer=1)")
TOKENS = {spec: 144.0 if spec == "full" else 36.0 for spec in SPECS}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SECONDS = 300  # of a command; a quiet machine needs a tenth

# a method that fails in the model, where several harnesses catch exceptions and score an empty answer
FAILING = """
import os
from dataclasses import dataclass

import torch
from tokensieve import register
from tokensieve.methods import ScoreMethod


@register("failing", paper="baseline")
@dataclass(frozen=True)
class Failing(ScoreMethod):
    keep: int = 36

    def score(self, image):
        if os.environ.get("RANK", "{rank}") == "{rank}":
            raise {error}
        return image.features.square().sum(-1)
"""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def own_lines(self) -> list[str]:
        """The lines of Tokensieve on stderr, apart from notes."""
        return [line for line in self.err.splitlines() if line.startswith("tokensieve: ") and "it/s]" not in line]


@dataclass(frozen=True)
class Bench:
    """One data set for all harnesses.

    Attributes:
        folder: what ``tokensieve harness export`` wrote.
        ids: of the questions, in their order.
        images: number of images, over all questions.
        answers: of ``tokensieve compare``: {run: {id: text}}.
    """

    folder: Path
    ids: list[str]
    images: int
    answers: dict[str, dict[str, str]]


def command(name: str, *arguments: object, processes: int = 1, cwd: Path | None = None, **environment: str) -> Outcome:
    """Run a module as a command, once or in several processes of torchrun."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    program = [*launcher, name, *map(str, arguments)]
    variables = {**os.environ, **OFFLINE, **environment}
    done = subprocess.run(program, capture_output=True, text=True, timeout=SECONDS, env=variables, cwd=cwd)
    return Outcome(done.returncode, done.stdout, done.stderr)


def make_bench(folder: Path) -> Bench:
    """Export questions of the bundled benchmark, and some about two images; answer them with ``tokensieve compare``."""
    first, mixed = folder / "first", folder / "mixed"
    exported = command("tokensieve", "harness", "export", first, "--limit", 41)
    assert exported.code == 0, exported.err
    rows = read_lines(first / "questions.jsonl")
    pairs = [
        row | {"id": f"two-{number}", "image": [*row["image"], rows[-1]["image"][0]]}
        for number, row in enumerate(rows[:3])
    ]
    (first / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + pairs), "utf-8")
    exported = command("tokensieve", "harness", "export", mixed, "--data", first / "mixed.jsonl")
    assert exported.code == 0, exported.err
    compared = command(
        "tokensieve", "compare", "--data", first / "mixed.jsonl", "--methods", ", ".join(SPECS[1:]), "--keep", 36,
        "--no-measure", "--no-referee", "--no-report", "--output", folder / "compare",
    )  # fmt: skip
    assert compared.code == 0, compared.err
    answers: dict[str, dict[str, str]] = {}
    for line in read_lines(folder / "compare" / "predictions.jsonl"):
        if "text" in line:
            answers.setdefault(line["run"], {})[line["sample"].rpartition(" ")[0]] = line["text"]
    exported_rows = read_lines(mixed / "questions.jsonl")
    ids = [row["id"] for row in exported_rows]
    assert len(ids) >= 40
    assert len({text for run in answers.values() for text in run.values()}) > 5, "equal answers would prove nothing"
    assert all(sorted(answers[spec]) == sorted(ids) for spec in SPECS)
    return Bench(mixed, ids, sum(len(row["image"]) for row in exported_rows), answers)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_run(folder: Path, bench: Bench) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the answers by id, and the results, of one run of lm-eval or lmms-eval."""
    (samples,), (results,) = folder.rglob("*samples_*.jsonl"), folder.rglob("*results*.json")
    answers = {}
    for row in read_lines(samples):
        text = row["filtered_resps"]
        while isinstance(text, list):
            (text,) = text
        answers[bench.ids[row["doc_id"]]] = text.strip()
    return answers, json.loads(results.read_text("utf-8"))


def check_run(answers: dict[str, str], record: dict[str, Any], spec: str, bench: Bench, processes: int = 1) -> None:
    """Check every answer against that of ``compare``, and the record of the method."""
    assert answers == bench.answers[spec]
    assert record["method"] == spec
    assert (record["positions"], record["processes"]) == ("original", processes)
    assert (record["questions"], record["images"]) == (len(bench.ids), bench.images)
    assert (record["tokens_before"], record["tokens_after"]) == (144.0, TOKENS[spec])
    assert record["version"]


def failing(folder: Path, error: str, rank: int = 0) -> str:
    """Write a method that raises an error in the model, in one process; return its spec."""
    path = folder / "failing.py"
    path.write_text(FAILING.format(error=error, rank=rank), "utf-8")
    return f"{path}:Failing"
