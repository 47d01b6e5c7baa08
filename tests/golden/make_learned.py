"""Keep the vectors of trained methods that the tests read: ``python -m tests.golden.make_learned FOLDER``.

FOLDER holds ``manifest.json`` and one safetensors file per procedure, made by running the authors' functions alone (the
manifest names repositories, commits, functions and deviations). Only numbers are stored.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.golden.official import GOLDEN

KEPT = {"visionselector": (), "dyvte_gate": (), "dyvte_label": (), "setok": (), "mqt_resampler": (), "tokenpacker": ()}
ALONE = ("pmod_layer",)  # in a file of their own, since the joined one is near its limit


def main(folder: Path) -> None:
    manifest, tensors, entries = json.loads((folder / "manifest.json").read_text("utf-8")), {}, []
    for entry in manifest["methods"]:
        if entry["method"] not in (*KEPT, *ALONE):
            continue
        wanted = KEPT.get(entry["method"], ())
        kept = {
            f"{entry['method']}/{key}": rows
            for key, rows in load_file(folder / entry["file"]).items()
            if not wanted or key.split("/")[-1] in wanted
        }
        file = entry["file"] if entry["method"] in ALONE else "learned.safetensors"
        if entry["method"] in ALONE:
            save_file(kept, GOLDEN / file)
        else:
            tensors |= kept
        cases = [{"case": c["case"], "hyperparameters": c["hyperparameters"]} for c in entry["cases"]]
        entries.append({**entry, "file": file, "cases": cases})
    head = {name: manifest[name] for name in ("set", "precision")} | {"set": "learned"}
    head |= {"key_format": "<method>/<case>/<in or out>/<tensor>; sd.* are parameters under the authors' names"}
    head |= {"script": "tests/golden/make_learned.py", "methods": entries}
    (GOLDEN / "manifest-learned.json").write_text(json.dumps(head, indent=1) + "\n", "utf-8")
    save_file(tensors, GOLDEN / "learned.safetensors")
    print(f"{len(tensors)} tensors of {len(entries)} procedures", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
