"""Run the laws on a tiny random model of every image-text-to-text type of the installed transformers.

python benchmarks/families.py --output docs/models.json                      # the evidence of docs/models.md
python benchmarks/families.py --types qwen3_vl_moe,gemma4                    # look at a few
python benchmarks/families.py --compare docs/models.json --output new.json   # what another release changed
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
NO_MODEL = "no tiny model of it runs"  # docs/make_models.py counts these types apart


def outcomes(entry: dict[str, Any]) -> dict[str, str]:
    """Return {stage: its outcome in one line} of one type."""
    if "refused" in entry:
        return {"all": f"refused: {entry['refused']}"}
    stages = entry["stages"].items()
    return {kind: ": ".join(filter(None, (stage["status"], stage["reason"]))) for kind, stage in stages}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return one line for each type and stage whose outcome differs between two runs."""
    lines = []
    for model_type in sorted(before.keys() | after.keys()):
        if model_type not in after or model_type not in before:
            lines.append(f"{model_type}: {'new' if model_type in after else 'gone'}")
            continue
        old, new = outcomes(before[model_type]), outcomes(after[model_type])
        for stage in sorted(old.keys() | new.keys()):
            if old.get(stage) != new.get(stage):
                lines.append(f"{model_type}, {stage}: {old.get(stage, '–')} -> {new.get(stage, '–')}")
    return lines


def run(types: list[str], output: Path | None, kept: dict[str, Any]) -> dict[str, Any]:
    """Run the laws on each type, and write the evidence so far after each one."""
    import transformers

    from tests.support.evidence import evidence
    from tests.support.zoo import TYPES

    entries: dict[str, Any] = {}
    for model_type in types:
        start = time.perf_counter()
        try:
            entries[model_type] = evidence(model_type)
        except Exception as error:  # a type that cannot be built must not end the run
            reason = f"{NO_MODEL}: {type(error).__name__}: {' '.join(str(error).split())}"
            entries[model_type] = {"refused": reason[:200]}
        short = {stage: outcome[:90] for stage, outcome in outcomes(entries[model_type]).items()}
        print(f"{model_type}: {short}, {time.perf_counter() - start:.1f} s", flush=True)
        if output is not None:
            record: dict[str, Any] = {"transformers": transformers.__version__, "types_of_the_release": len(TYPES)}
            record["types"] = dict(sorted({**kept, **entries}.items()))
            output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="model types, separated by commas; all if left out")
    parser.add_argument("--output", type=Path, help="write the evidence here; types that did not run are kept")
    parser.add_argument("--compare", type=Path, help="print what differs from this earlier evidence")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import transformers

    from tests.support.zoo import TYPES

    earlier = {} if args.compare is None else json.loads(args.compare.read_text("utf-8"))
    keeps = args.types and args.output is not None and args.output.exists()
    kept = json.loads(args.output.read_text("utf-8"))["types"] if keeps else {}
    entries = run(args.types.split(",") if args.types else list(TYPES), args.output, kept)
    if args.compare is not None:
        types = earlier["types"]
        if args.types:
            types = {name: entry for name, entry in types.items() if name in entries}
        changes = differences(types, entries)
        print(f"transformers {earlier['transformers']} -> {transformers.__version__}: {len(changes)} changes")
        print("\n".join(changes))


if __name__ == "__main__":
    main()
