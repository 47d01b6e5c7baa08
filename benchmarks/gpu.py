"""Run the checks and benchmarks on a GPU, part by part: `benchmarks/gpu.sh`, or with `--toy` tiny models on a CPU.

Each part is a process of its own with a limit of eight minutes, and one JSON file in the folder of results: status,
command, hardware, versions, and the report of its benchmark. Finished parts are skipped, so that the same command
continues after an interruption; a part that failed runs again. `gpu_tables.py` makes the tables of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
LIMIT = 480  # seconds of a part
BATCHES = (1, 8, 32)
MODELS = ("llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b")


def parts(toy: bool) -> dict[str, list[str]]:
    """Return {name: the benchmark and its arguments}. A toy run covers each benchmark, at tiny sizes and once."""
    quick, once = ["--repeats", "1", "--batch", "1"], ["--repeats", "1", "--pairs", "1"]
    if toy:
        return {
            "laws-float32": ["laws.py", "--kernels", "sdpa", "flash_attention_2", "--methods", "1"],
            "overhead": ["overhead.py", "--llm", "tiny", *quick],
            "decoder": ["decoder.py", "--llm", "tiny", *quick],
            "encoder": ["encoder.py", "--tiny", "--methods", "tome(keep=0.25)", *quick],
            "selection": ["selection.py", "--device", "cpu", "--tokens", "576", "--methods", "divprune", *once],
            "pumer-vilt": ["pumer.py", "--models", "vilt", "--tiny", *quick],
            "whole": ["whole.py", "--toy", "--model", *MODELS, "--keep", "5", "--tokens", "2", *quick],
            "graphs": ["whole.py", "--toy", "--graphs", "--keep", "5", "--repeats", "1"],
        }  # fmt: skip
    half = ["--dtype", "bfloat16"]
    return {
        **{f"laws-{dtype}": ["laws.py", "--dtype", dtype] for dtype in ("float32", "bfloat16", "float16")},
        **{f"overhead-{n}": ["overhead.py", "--llm", "7b", *half, "--batch", str(n)] for n in BATCHES},
        **{f"decoder-{n}": ["decoder.py", "--llm", "7b", *half, "--batch", str(n)] for n in BATCHES},
        **{f"encoder-{n}": ["encoder.py", *half, "--batch", str(n)] for n in BATCHES},
        "selection": ["selection.py", "--device", "cuda", "--most-quadratic", "2880"],
        **{f"pumer-{name}": ["pumer.py", "--models", name] for name in ("vilt", "meter", "bridgetower")},
        **{
            f"whole-{name}-{n}": ["whole.py", "--model", name, *half, "--batch", str(n)]
            for name in MODELS
            for n in BATCHES
        },
        **{f"graphs-{name}": ["whole.py", "--graphs", "--model", name, *half] for name in MODELS},
    }


def hardware() -> dict[str, Any]:
    """Return versions and hardware; names no host and no path."""
    about = {library: version(library) for library in ("tokensieve", "torch", "transformers")}
    about |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        about |= {"gpu": properties.name, "gpu_memory": memory, "cuda": str(torch.version.cuda)}
    return about


def run_part(name: str, arguments: Sequence[str], folder: Path, limit: float) -> dict[str, Any]:
    """Run one part in a process of its own, and write its file."""
    report = folder / f"{name}.report.json"
    report.unlink(missing_ok=True)
    command = ["python", f"benchmarks/{arguments[0]}", *arguments[1:]]
    program = [sys.executable, str(HERE / arguments[0]), *arguments[1:], "--output", str(report)]
    started = time.monotonic()
    outcome: dict[str, Any] = {"part": name, "status": "done", "command": " ".join(command)}
    with (folder / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(program, stdout=log, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            outcome |= {"status": "failed", "reason": f"took more than {limit:.0f} s"}
        else:
            if code or not report.is_file():
                outcome |= {"status": "failed", "reason": f"exit code {code}; see {name}.log"}
    outcome |= {"seconds": round(time.monotonic() - started, 1), "hardware": hardware()}
    outcome["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    if report.is_file():
        outcome["report"] = json.loads(report.read_text())
        report.unlink()
    temporary = folder / f"{name}.json.part"
    temporary.write_text(json.dumps(outcome, indent=1) + "\n")
    temporary.replace(folder / f"{name}.json")  # a file with the final name is always whole
    return outcome


def finished(file: Path) -> bool:
    """Return whether a part's file exists and its part did not fail."""
    return file.is_file() and json.loads(file.read_text())["status"] == "done"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of results; default: runs/gpu, or runs/gpu-toy")
    parser.add_argument("--only", nargs="+", help="parts whose names begin with one of these")
    parser.add_argument("--list", action="store_true", help="only print the parts")
    parser.add_argument("--toy", action="store_true", help="tiny models, on a CPU too: only checks that all of it runs")
    args = parser.parse_args()
    chosen = {
        name: part for name, part in parts(args.toy).items() if not args.only or name.startswith(tuple(args.only))
    }
    if not chosen:
        parser.error(f"no part begins with {' or '.join(args.only)}; --list prints them")
    if args.list:
        print("\n".join(f"{name}: {' '.join(part)}" for name, part in chosen.items()))
        return 0
    if not args.toy and not torch.cuda.is_available():
        parser.error("no CUDA device; --toy runs tiny models on the CPU")
    folder = args.output or Path("runs/gpu-toy" if args.toy else "runs/gpu")
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, (name, arguments) in enumerate(chosen.items(), 1):
        if finished(folder / f"{name}.json"):
            print(f"{number}/{len(chosen)} {name}: finished before", flush=True)
            continue
        outcome = run_part(name, arguments, folder, LIMIT)
        reason = f" ({outcome['reason']})" if "reason" in outcome else ""
        print(f"{number}/{len(chosen)} {name}: {outcome['status']}{reason}, {outcome['seconds']:.0f} s", flush=True)
        failed += [name] if outcome["status"] == "failed" else []
    print(f"results: {folder}; tables: python benchmarks/gpu_tables.py {folder}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
