"""``benchmarks/gpu.sh`` with tiny models on the CPU: every part runs, a second call skips them, and tables are made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import gpu_tables  # noqa: E402

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu")
    done = run("--toy", "--output", path)
    logs = "\n".join(log.read_text() for log in path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return path


@pytest.mark.slow
def test_every_part_has_its_results(folder: Path) -> None:
    parts = {part["part"]: part for part in gpu_tables.read(folder)}
    assert set(parts) == set(gpu.parts(toy=True))
    for part in parts.values():
        assert part["status"] == "done"
        assert part["command"].startswith("python benchmarks/")
        assert part["hardware"]["torch"] == torch.__version__
        assert part["report"].get("results") or part["report"].get("runs")
    verdicts = [v for row in parts["laws-float32"]["report"]["results"] for v in row.get("verdicts", [])]
    assert {verdict["status"] for verdict in verdicts} == {"pass"}
    assert {row["model"] for row in parts["whole"]["report"]["results"]} == set(gpu.MODELS)
    for row in parts["whole"]["report"]["results"]:
        assert row["logit_difference_over_std"] < 1e-3, "the oracle is the method's own choice"
        assert row["image_tokens"][1] < row["image_tokens"][0]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_what_needs_a_device_is_recorded_as_skipped(folder: Path) -> None:
    parts = {
        part["part"]: part["report"]["results"] for part in gpu_tables.read(folder) if "whole.py" in part["command"]
    }
    assert {count for row in parts["whole"] for count in row["waits"].values()} == {
        "skipped: counted on a CUDA device only"
    }
    graphs = {row["way"]: row["status"] for row in parts["graphs"]}
    assert graphs == {"torch.compile": "works", "CUDA graph": "skipped"}
    laws = json.loads((folder / "laws-float32.json").read_text())["report"]["results"]
    assert [row["reason"] for row in laws if row["kernel"] == "flash_attention_2"] == ["needs a CUDA device"]


@pytest.mark.slow
def test_finished_parts_are_skipped_and_failed_ones_run_again(folder: Path) -> None:
    again = run("--toy", "--output", folder)
    assert again.returncode == 0
    assert again.stdout.count("finished before") == len(gpu.parts(toy=True))
    assert gpu.finished(folder / "whole.json")
    broken = folder / "broken.json"
    broken.write_text(json.dumps({"status": "failed"}))
    assert not gpu.finished(broken)
    broken.unlink()


@pytest.mark.slow
def test_the_tables_hold_every_part(folder: Path) -> None:
    text = gpu_tables.text_of(gpu_tables.read(folder))
    for title, _, _ in gpu_tables.SECTIONS:
        assert f"**{title}**" in text
    assert "Parts without a result" not in text


def test_a_part_that_fails_or_takes_too_long_says_so(tmp_path: Path) -> None:
    wrong = gpu.run_part("wrong", ["overhead.py", "--llm", "none"], tmp_path, 60)
    assert (wrong["status"], wrong["reason"]) == ("failed", "exit code 2; see wrong.log")
    slow = gpu.run_part("slow", ["overhead.py", "--llm", "tiny"], tmp_path, 0.1)
    assert (slow["status"], slow["reason"]) == ("failed", "took more than 0 s")
    text = gpu_tables.text_of(gpu_tables.read(tmp_path))
    assert "`python benchmarks/overhead.py --llm none`: exit code 2" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_only_a_toy_run_starts(tmp_path: Path) -> None:
    refused = run("--output", tmp_path / "runs")
    assert refused.returncode == 2
    assert "no CUDA device; --toy runs tiny models on the CPU" in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_the_parts_cover_every_precision_kernel_shape_and_batch() -> None:
    parts = gpu.parts(toy=False)
    assert {f"laws-{dtype}" for dtype in ("float32", "bfloat16", "float16")} <= set(parts)
    assert {f"whole-{name}-{batch}" for name in gpu.MODELS for batch in (1, 8, 32)} <= set(parts)
    assert {arguments[0] for arguments in parts.values()} == {
        arguments[0] for arguments in gpu.parts(toy=True).values()
    }


def test_the_page_takes_the_tables() -> None:
    page = gpu_tables.PAGE.read_text("utf-8")
    assert page.index(gpu_tables.BEGIN) < page.index(gpu_tables.END)
