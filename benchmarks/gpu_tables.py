"""Tables of a folder of `gpu.sh`, in Markdown; with `--write` into docs/benchmarks.md, between its two marks.

python benchmarks/gpu_tables.py runs/gpu --write
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- made by benchmarks/gpu_tables.py -->", "<!-- end -->"
Part = dict[str, Any]


def read(folder: Path) -> list[Part]:
    """Return the outcomes of all parts in a folder of results."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json")) if ".report." not in file.name]


def text_of(parts: Sequence[Part]) -> str:
    """Return the section of the page."""
    lines = [*_hardware(parts)]
    for title, prefix, table in SECTIONS:
        rows = [row for part in parts if part["part"].startswith(prefix) for row in table(part)]
        if rows:
            header = list(rows[0])
            lines += ["", f"**{title}**", "", _line(header), "|" + "---|" * len(header)]
            lines += [_line([str(row[column]) for column in header]) for row in rows]
    failed = [part for part in parts if part["status"] != "done"]
    if failed:
        lines += ["", "Parts without a result:", ""]
        lines += [f"- `{part['command']}`: {part['reason']}" for part in failed]
    return "\n".join(lines)


def _hardware(parts: Sequence[Part]) -> Iterator[str]:
    """Yield one line for each machine: hardware and versions, and the span of the dates."""
    machines: dict[str, list[str]] = {}
    for part in parts:
        about = ", ".join(f"{name} {value}" for name, value in part["hardware"].items())
        machines.setdefault(about, []).append(part["date"])
    for about, dates in machines.items():
        yield f"{about}; {min(dates)} to {max(dates)}, {len(dates)} parts."


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f}–{spread['high']:.2f})"


def _results(part: Part) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = part.get("report", {}).get("results", [])
    return found


def _laws(part: Part) -> Iterator[dict[str, Any]]:
    """Yield one row for each kernel: the number of verdicts by status."""
    results = _results(part)
    for kernel in dict.fromkeys(row["kernel"] for row in results):
        rows = [row for row in results if row["kernel"] == kernel]
        counts = Counter(verdict["status"] for row in rows for verdict in row.get("verdicts", []))
        shown = ", ".join(f"{count} {status}" for status, count in counts.items())
        dtype = part["report"]["settings"]["dtype"]
        yield {"precision": dtype, "kernel": kernel, "verdicts": shown or f"unavailable: {rows[0]['reason']}"}


def _whole(part: Part) -> Iterator[dict[str, Any]]:
    for row in _results(part):
        shown = {"model": row["model"], "batch": row["batch"]}
        if "status" in row:
            blank = dict.fromkeys(["tokens", *WHOLE_RATIOS, "decode, ms per token", "peak, MiB", "waits"], "–")
            yield shown | blank | {"tokens": row["status"]}
            continue
        decode, memory, waits = row["decode_ms_per_token"], row["peak_memory_mib"], row["waits"]
        counted = [
            sum(waits[way].values()) if isinstance(waits[way], dict) else "–" for way in ("full", "method", "public")
        ]
        yield {
            **shown,
            "tokens": " to ".join(map(str, row["image_tokens"])),
            **{title: _ratio(row[key]) for title, key in WHOLE_RATIOS.items()},
            "decode, ms per token": " / ".join(f"{median(decode[way]):.2f}" for way in ("full", "method", "oracle")),
            "peak, MiB": " / ".join(f"{memory[way]:,.0f}" for way in ("full", "method", "oracle", "public")),
            "waits": " / ".join(map(str, counted)),
        }


WHOLE_RATIOS = {
    "full ÷ method": "full_over_method",
    "method ÷ oracle": "method_over_oracle",
    "public ÷ method": "public_over_method",
    "full ÷ fastv": "full_over_fastv",
}


def _ratios(**columns: str) -> Callable[[Part], Iterator[dict[str, Any]]]:
    """Return the rows of a benchmark: the batch, and the named ratios."""

    def rows(part: Part) -> Iterator[dict[str, Any]]:
        for row in _results(part):
            what = row.get("model", "") or row.get("method", "") or part["part"]
            shown = {"what": f"{what} {row['spec']}" if "spec" in row else what, "batch": row["batch"]}
            yield shown | {title.replace("_", " "): _ratio(row[key]) for title, key in columns.items()}

    return rows


def _selection(part: Part) -> Iterator[dict[str, Any]]:
    for run in part.get("report", {}).get("runs", [])[:1]:
        for name, loop in run["loops"].items():
            yield {"method": name, "public loop ÷ ours, 576 tokens": _ratio(loop["ratio"])}


def _graphs(part: Part) -> Iterator[dict[str, Any]]:
    for row in _results(part):
        times = row.get("compiled_ms") or row.get("replay_ms")
        ratio = f"{median(row['plain_ms']) / median(times):.2f}" if times else "–"
        outcome = row["status"] if "reason" not in row else f"{row['status']}: {row['reason']}"
        yield {"model": row["model"], "with": row["method"], "way": row["way"], "outcome": outcome, "plain ÷ it": ratio}


SECTIONS: list[tuple[str, str, Callable[[Part], Iterator[dict[str, Any]]]]] = [
    ("Equivalence checks", "laws", _laws),
    ("Whole models: decode is full / method / oracle, peak and waits add public code", "whole", _whole),
    ("vtc-cls", "overhead", _ratios(method_over_oracle="method_over_oracle", eager_over_method="eager_over_method")),
    ("FastV", "decoder", _ratios(method_over_ideal="method_over_ideal", eager_over_method="eager_over_method")),
    (
        "Inside the encoder",
        "encoder",
        _ratios(method_over_full="method_over_full", method_over_ideal="method_over_ideal"),
    ),
    ("PuMer", "pumer", _ratios(throughput="throughput_ratio")),
    ("Decisions", "selection", _selection),
    ("torch.compile of the LLM, and a CUDA graph of the prefill", "graphs", _graphs),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    args = parser.parse_args()
    parts = read(args.folder)
    if not parts:
        parser.error(f"no results in {args.folder}")
    text = text_of(parts)
    if not args.write:
        print(text)
        return
    if any("gpu" not in part["hardware"] for part in parts):
        parser.error("these results are not of a GPU; the page takes no others")
    page = PAGE.read_text("utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", "utf-8")
    print(f"written: {PAGE.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
