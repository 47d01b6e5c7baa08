"""A batch on a local Ray cluster of two nodes, one of which is killed in the middle: every row once, and rows a second.

python benchmarks/batch.py --rows 20000 --output benchmarks/results/batch-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from script import parser_of, run_script
from tokensieve.batch import Job, Place
from tokensieve.batch import run as run_batch
from tokensieve.evaluate.plan import Settings
from tokensieve.reference.benchmark import SCENES, benchmark
from tokensieve.reference.vilt import ASKED


def write_data(rows: int, folder: Path) -> Path:
    """Write the bundled benchmark as JSONL beside its images, repeated with distinct ids up to ``rows`` rows."""
    questions = benchmark(scenes=min(SCENES, -(-rows // len(ASKED))), types=ASKED)
    numbers = {scene: n for n, scene in enumerate(dict.fromkeys(row.scene for row in questions))}
    for scene, number in numbers.items():
        scene.image.save(folder / f"{number}.png")
    with (folder / "data.jsonl").open("w") as file:
        for n in range(rows):
            row = questions[n % len(questions)]
            values = {"id": f"{row.id}#{n // len(questions)}", "image": f"{numbers[row.scene]}.png"}
            file.write(json.dumps({**values, "question": row.question, "answer": row.answer}) + "\n")
    return folder / "data.jsonl"


def run(args: argparse.Namespace) -> dict[str, Any]:
    os.environ["RAY_BACKEND_LOG_LEVEL"], os.environ["RAY_USAGE_STATS_ENABLED"] = "fatal", "0"
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="critical")
    killed: dict[str, Any] = {}
    started = time.monotonic()

    def watch(done: int, total: int, label: str) -> None:
        print(f"{done} of {total} rows, {time.monotonic() - started:.0f} s: {label}", flush=True)
        if done >= args.kill_at * total and not killed and args.kill_at < 1:
            killed.update(at_rows=done, at_seconds=round(time.monotonic() - started, 1))
            cluster.remove_node(second, allow_graceful=False)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        data = write_data(args.rows, folder / "data")
        job = Job(
            model="reference",
            data=str(data),
            methods=(args.method,),
            settings=Settings(seeds=1, measure=False, max_new_tokens=4),
            rows_per_part=args.rows_per_part,
        )
        summary = run_batch(job, folder / "out", place=Place(workers=2), progress=watch)
        parts = sorted((folder / "out/answers").glob("part-*.jsonl"))
        lines = [json.loads(line) for part in parts for line in part.read_text("utf-8").splitlines()]
        wanted = [json.loads(line)["id"] for line in data.read_text("utf-8").splitlines()]
        environment = json.loads((folder / "out/environment.json").read_text("utf-8"))
    ray.shutdown()
    cluster.shutdown()
    counts = Counter(line["id"] for line in lines)
    report = {
        "settings": {"rows": args.rows, "method": args.method, "rows_per_part": args.rows_per_part, "workers": 2},
        "environment": environment,
        "summary": summary,
        "killed": killed,
        "rows_once": sum(counts[name] == 1 for name in wanted),
        "rows_missing": sum(name not in counts for name in wanted),
        "rows_twice": sum(count > 1 for count in counts.values()),
        "rows_foreign": len(counts.keys() - set(wanted)),
        "rows_in_output": len(lines),
    }
    print(json.dumps({key: value for key, value in report.items() if key != "environment"}, indent=1))
    return report


def main() -> None:
    parser = parser_of(__doc__, threads=None)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rows-per-part", type=int, default=256)
    parser.add_argument("--method", default="vtc-cls(keep=36)")
    parser.add_argument("--kill-at", type=float, default=0.5, help="share of the rows after which a node is killed")
    run_script(parser, run)


if __name__ == "__main__":
    main()
