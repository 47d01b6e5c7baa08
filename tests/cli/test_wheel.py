"""The package: it builds, its metadata is whole, and the wheel works in an environment of its own."""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import tomllib

import tokensieve

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def run(*command: str | Path, folder: Path = ROOT) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with source archive and wheel; the wheel is built from the archive, as for a release."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone; its libraries are read from the folder of this one, to stay offline."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    # a path in a .pth file comes after the wheel; .pth files in it, such as an editable install's, are not read
    (packages / "libraries.pth").write_text("\n".join(site.getsitepackages()))
    return folder


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_version_is_the_same_everywhere() -> None:
    heading = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)
    assert heading is not None
    assert cited is not None
    assert heading[1] == cited[1] == tokensieve.__version__


def packages(extra: str) -> set[str]:
    """The packages that an extra brings beside other extras of Tokensieve."""
    return {re.split(r"[\[<>=]", need)[0] for need in EXTRAS[extra]} - {"tokensieve"}


def test_the_table_of_extras_is_that_of_the_package() -> None:
    page = (ROOT / "docs" / "start.md").read_text("utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| .+ \| ([^|]*?) ?\|$", page, re.M))
    assert set(table) == set(EXTRAS)
    for extra, cell in table.items():
        if cell:
            assert set(cell.split(", ")) == packages(extra), extra


def test_the_extras_of_extras_are_those_on_the_page() -> None:
    page = (ROOT / "docs" / "start.md").read_text("utf-8")
    for extra in ("all", "dev"):
        sentence = re.search(rf"^\| `{extra}` \| all of these but (.+?) \|", page, re.M)
        assert sentence is not None
        parts = [re.findall(r"tokensieve\[(.+)\]", need) for need in EXTRAS[extra]]
        members = {name for found in parts for names in found for name in names.split(",")}
        members |= (
            {name for need in EXTRAS["all"] for name in re.findall(r"\w+", need)[1:]} if "all" in members else set()
        )
        assert members - {"all"} == set(EXTRAS) - {"all", "dev"} - set(re.findall(r"`(\w+)`", sentence[1]))


@pytest.mark.parametrize("link", re.findall(r'pip install [^`\n]*?-e "\.\[([\w,]+)\]"', "\n".join(
    path.read_text("utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
)))  # fmt: skip
def test_extras_in_the_pages_exist(link: str) -> None:
    assert set(link.split(",")) <= set(EXTRAS)


@pytest.mark.slow
def test_an_index_takes_the_package_and_renders_the_readme(built: Path) -> None:
    pytest.importorskip("twine")
    run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())


@pytest.mark.slow
def test_the_metadata_is_whole(metadata: Message) -> None:
    assert metadata["Version"] == tokensieve.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    labels = {url.partition(",")[0] for url in metadata.get_all("Project-URL", [])}
    assert labels == {"Documentation", "Source", "Changelog", "Issues"}
    assert set(metadata.get_all("Provides-Extra", [])) == set(EXTRAS)
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


@pytest.mark.slow
def test_the_wheel_holds_what_runs_and_no_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert {"tokensieve/py.typed", "tokensieve/reference/weights/llava-reference/model.safetensors"} <= sources
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == sources
    assert wheel.stat().st_size < 25e6, "an index has limits, and so has a reader's patience"


@pytest.mark.slow
def test_the_source_archive_holds_the_tests_and_the_pages(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "mkdocs.yml", "docs/index.md", "tests/cli/test_wheel.py", "LICENSE"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("runs/", "site/"))]


@pytest.mark.slow
def test_the_installed_wheel_works(environment: Path, tmp_path: Path) -> None:
    binaries = environment / "bin"
    place = run(binaries / "python", "-c", "import tokensieve; print(tokensieve.__file__)", folder=tmp_path)
    assert Path(place.strip()).is_relative_to(environment), "not the checkout"
    assert run(binaries / "tokensieve", "--version", folder=tmp_path).startswith(f"tokensieve {tokensieve.__version__}")
    asked = json.loads(run(binaries / "tokensieve", "ask", "--json", folder=tmp_path))
    assert asked["right_answer"]
    run(binaries / "tokensieve", "new-method", "mine", folder=tmp_path)
    assert (tmp_path / "mine.py").is_file()
    points = run(
        binaries / "python", "-c",
        "from importlib.metadata import entry_points as e; print([p.value for p in e(group='vllm.general_plugins')])",
        folder=tmp_path,
    )  # fmt: skip
    assert "tokensieve.vllm:register" in points
