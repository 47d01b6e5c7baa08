"""Run engines for tests, and the same prompts under transformers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GREEDY = {"temperature": 0, "max_tokens": 4}


def run_engine(
    folder: Path,
    model: str,
    *passes: list[dict[str, Any]],
    sampling: Any = GREEDY,
    adapter: str = "",
    positions: bool = False,
    **engine: Any,
) -> dict[str, Any]:
    """Run lists of prompts one after another on one engine, in a process of its own.

    Returns:
        "passes": per list the token ids, texts, prompt lengths and cached tokens of each prompt, and the images per
        encode call, and "kept" of its images; with ``positions`` the position ids that entered the LLM in each step; or
        "refused": why the pass was refused. "kept": {(pixel hash, word ids): kept tokens} of every image. "tally": the
        counts of the process.
    """
    result = _run(folder, model, passes, sampling, adapter, engine, positions)
    if result.returncode:
        pytest.fail(f"the engine failed:\n{result.stdout[-2000:]}\n{result.stderr[-8000:]}")
    with open(folder / "job.out", "rb") as file:
        out: dict[str, Any] = pickle.load(file)
    return out


def engine_error(folder: Path, model: str, *passes: list[dict[str, Any]], **engine: Any) -> str:
    """Return what an engine that must fail printed."""
    result = _run(folder, model, passes, GREEDY, "", engine)
    assert result.returncode, "the engine ran"
    return result.stdout + result.stderr


def _run(
    folder: Path, model: str, passes: Any, sampling: Any, adapter: str, engine: Any, positions: bool = False
) -> Any:
    of_passes = [(prompts, sampling, adapter) for prompts in passes]
    job = {"model": model, "engine": engine, "passes": of_passes, "positions": positions}
    with open(folder / "job", "wb") as file:
        pickle.dump(job, file)
    command = [sys.executable, str(Path(__file__).with_name("run_engine.py")), str(folder / "job")]
    return subprocess.run(
        command, env={"OMP_NUM_THREADS": "1", **os.environ}, capture_output=True, text=True, timeout=600, check=False
    )
