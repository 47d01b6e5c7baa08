"""Keep the vectors of trained methods that the tests read: ``python -m tests.golden.make_learned FOLDER``.

FOLDER holds ``manifest.json`` and one safetensors file per procedure, made by running the authors' functions alone (the
manifest names repositories, commits, functions and deviations). Only numbers are stored.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden.official import GOLDEN

KEPT = {"visionselector": (), "dyvte_gate": (), "dyvte_label": (), "setok": (), "mqt_resampler": (), "tokenpacker": ()}
KEPT |= {"glimpse_vip": (), "pmod_layer": (), "yopo": (), "llavamini_compressor": ()}
# files of their own, so that none is larger than a megabyte
APART = {
    "glimpse_vip": "glimpse.safetensors",
    "pmod_layer": "pmod_layer.safetensors",
    "yopo": "yopo.safetensors",
    "llavamini_compressor": "llavamini_compressor.safetensors",
}


def main(folder: Path) -> None:
    manifest, entries = json.loads((folder / "manifest.json").read_text("utf-8")), []
    files: dict[str, dict[str, Tensor]] = {}
    for entry in manifest["methods"]:
        if entry["method"] not in KEPT:
            continue
        wanted, file = KEPT[entry["method"]], APART.get(entry["method"], "learned.safetensors")
        tensors = files.setdefault(file, {})
        for key, rows in load_file(folder / entry["file"]).items():
            if not wanted or key.split("/")[-1] in wanted:
                tensors[f"{entry['method']}/{key}"] = rows
        cases = [{"case": c["case"], "hyperparameters": c["hyperparameters"]} for c in entry["cases"]]
        entries.append({**entry, "file": file, "cases": cases})
    head = {name: manifest[name] for name in ("set", "precision")} | {"set": "learned"}
    head |= {"key_format": "<method>/<case>/<in or out>/<tensor>; sd.* are parameters under the authors' names"}
    head |= {"script": "tests/golden/make_learned.py", "methods": entries}
    (GOLDEN / "manifest-learned.json").write_text(json.dumps(head, indent=1) + "\n", "utf-8")
    for file, tensors in files.items():
        save_file(tensors, GOLDEN / file)
        print(f"{file}: {len(tensors)} tensors", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
