"""Write the table of model types in ``docs/models.md`` from the evidence in ``docs/models.json``.

``python benchmarks/families.py --output docs/models.json`` makes the evidence by running the laws.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
START, END = "<!-- made by docs/make_models.py -->", "<!-- end of what docs/make_models.py makes -->"
NO_MODEL = "no tiny model of it runs"  # as benchmarks/families.py writes it
STAGES = ("features", "encoder", "decoder")


def page(text: str, record: dict[str, Any]) -> str:
    """Return the page with the table of its record."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table(record)}\n{END}{after}"


def table(record: dict[str, Any]) -> str:
    """Return the summary and the table of all types."""
    types: dict[str, dict[str, Any]] = record["types"]
    passed = [name for name, entry in types.items() if _passes(entry)]
    whole = [name for name in passed if all(_status(types[name], stage) == "passed" for stage in STAGES)]
    unchecked = [name for name, entry in types.items() if _unchecked(entry)]
    absent = record["types_of_the_release"] - len(types)
    lines = [
        f"transformers {record['transformers']} has {record['types_of_the_release']} image-text-to-text types. The "
        f"table has {len(types)} of them: {len(passed)} pass with methods that read features or the prompt, "
        f"{len(whole)} of these at all three stages. {len(unchecked)} are not checked, because no tiny model of them "
        "could be run; the others are refused." + f" {absent} have not been tried." * (absent > 0),
        "",
        "| model type | recognised | features, prompt | attention of the encoder | inside the LLM |",
        "|---|---|---|---|---|",
    ]
    for name, entry in types.items():
        if "refused" in entry:
            outcome = "not checked" if _unchecked(entry) else "refused"
            lines.append(f"| `{name}` | {outcome}: {_cell(entry['refused'])} | – | – | – |")
        else:
            remark = f" ({_cell(entry['remark'])})" if entry["remark"] else ""
            cells = " | ".join(_outcome(entry["stages"][stage]) for stage in STAGES)
            lines.append(f"| `{name}` | {entry['recognised']}{remark} | {cells} |")
    return "\n".join(lines)


def _passes(entry: dict[str, Any]) -> bool:
    return _status(entry, "features") == "passed"


def _unchecked(entry: dict[str, Any]) -> bool:
    return str(entry.get("refused", "")).startswith(NO_MODEL)


def _status(entry: dict[str, Any], stage: str) -> str:
    return str(entry["stages"][stage]["status"]) if "stages" in entry else "refused"


def _outcome(stage: dict[str, Any]) -> str:
    if stage["status"] != "passed":
        return f"{stage['status']}: {_cell(stage['reason'])}"
    return "passed" if not stage["skipped"] else f"passed, without {' and '.join(stage['skipped'])}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> None:
    path = DOCS / "models.md"
    record = json.loads((DOCS / "models.json").read_text("utf-8"))
    path.write_text(page(path.read_text("utf-8"), record), "utf-8")


if __name__ == "__main__":
    main()
