"""Run a function of a test module in a process of its own: vLLM keeps its state in the process that it runs in."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
REPOSITORY = Path(__file__).parents[2]


def run_apart(function: Callable[..., T], *args: Any, timeout: float = 600, env: Mapping[str, str] | None = None) -> T:
    """Return what the function returns for these arguments; all of it must pickle."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job"
        job.write_bytes(pickle.dumps((function.__module__, function.__name__, args)))
        settings = {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is in that process
            "VLLM_LOGGING_LEVEL": "WARNING",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **os.environ,
            **(env or {}),
        }
        command = [sys.executable, "-m", "tests.vllm.apart", str(job)]
        result = subprocess.run(
            command, cwd=REPOSITORY, env=settings, capture_output=True, text=True, timeout=timeout, check=False
        )
        if result.returncode:
            pytest.fail(f"{function.__name__} failed:\n{result.stdout[-3000:]}\n{result.stderr[-8000:]}")
        returned: T = pickle.loads((Path(folder) / "out").read_bytes())
        return returned


def main(job: Path) -> None:
    module, name, args = pickle.loads(job.read_bytes())
    returned = getattr(importlib.import_module(module), name)(*args)
    job.with_name("out").write_bytes(pickle.dumps(returned))


if __name__ == "__main__":  # vLLM's own processes import this file
    main(Path(sys.argv[1]))
