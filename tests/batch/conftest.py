"""Bundled questions on disk, and one local Ray for all tests of a file."""

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tokensieve.batch import Job
from tokensieve.evaluate.plan import Settings
from tokensieve.reference.benchmark import benchmark
from tokensieve.reference.vilt import ASKED

ROWS, PER_PART = 210, 30
SETTINGS = Settings(seeds=1, measure=False, max_new_tokens=4)


def write_rows(folder: Path, rows: list[dict]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a JSONL file of 210 bundled questions about 30 images that lie beside it."""
    folder = tmp_path_factory.mktemp("questions")
    rows, numbers = [], {}
    for row in benchmark(scenes=ROWS // len(ASKED), types=ASKED):
        name = f"images/{numbers.setdefault(row.scene, len(numbers))}.png"
        (folder / "images").mkdir(exist_ok=True)
        if not (folder / name).exists():
            row.image.save(folder / name)
        rows.append({"id": row.id, "image": name, "question": row.question, "answer": row.answer, "type": row.type})
    assert len(rows) == ROWS
    return write_rows(folder, rows)


@pytest.fixture(scope="session")
def cluster():
    """Return a Ray cluster on this machine, of one node with two cores."""
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="critical")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def job(data: Path, *methods: str, **options) -> Job:
    return Job(
        "reference", str(data), methods or ("vtc-cls(keep=36)",), settings=SETTINGS, rows_per_part=PER_PART, **options
    )


def lines(folder: Path) -> list[dict]:
    return [
        json.loads(line)
        for part in sorted((folder / "answers").glob("part-*.jsonl"))
        for line in part.read_text().splitlines()
    ]


def ids(data: Path) -> list[str]:
    return [json.loads(line)["id"] for line in data.read_text("utf-8").splitlines()]


def assert_every_row_once(folder: Path, data: Path) -> None:
    """Compare the ids of the answers with those of the data, as multisets."""
    assert Counter(line["id"] for line in lines(folder)) == Counter(ids(data))
    assert not list(folder.glob("**/.*.tmp"))


def workers_of(process: int) -> list[int]:
    """Return the process ids of Ray's actors below a process."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                names[int(entry.name)] = (entry / "cmdline").read_text(errors="replace")
            except OSError:  # it has ended
                continue
            parents[int(entry.name)] = int(stat[1])

    def below(number: int) -> bool:
        while number in parents:
            number = parents[number]
            if number == process:
                return True
        return False

    return [number for number, name in names.items() if name.startswith("ray::MapWorker") and below(number)]


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)
