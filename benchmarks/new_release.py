"""Try another release of transformers: run the laws on every model type in an environment of its own, and compare.

python benchmarks/new_release.py 5.24.0                       # prints the types whose outcome changed
python benchmarks/new_release.py 5.24.0 --folder try          # keeps the environment and the evidence there
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "models.json"


def commands(release: str, folder: Path, types: str | None) -> list[list[str]]:
    """Return the commands that install a release into ``folder`` and run the laws there."""
    python = str(folder / "bin" / "python")
    limit = [] if types is None else ["--types", types]
    output = ["--output", str(folder / f"models-{release}.json")]
    return [
        [python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints-cpu.txt"), "torch", "pillow"],
        [python, "-m", "pip", "install", "--quiet", "-e", str(ROOT)],
        [python, "-m", "pip", "install", "--quiet", f"transformers=={release}"],
        [python, str(ROOT / "benchmarks" / "families.py"), "--compare", str(EVIDENCE), *output, *limit],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", help="a release of transformers, e.g. 5.24.0")
    parser.add_argument("--folder", type=Path, help="keep the environment here; a temporary one if left out")
    parser.add_argument("--types", help="model types, separated by commas; all if left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary).absolute()
        venv.create(folder, with_pip=True)
        for command in commands(args.release, folder, args.types):
            if (code := subprocess.run(command, cwd=ROOT).returncode) != 0:
                sys.exit(code)


if __name__ == "__main__":
    main()
