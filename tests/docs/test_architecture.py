"""The architecture page: its files exist, its links lead to headings, and its picture shows the present imports."""

import re
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "tokensieve"
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
sys.path.append(str(ROOT / "docs"))
import make_architecture  # noqa: E402


def test_the_files_on_the_page_exist():
    paths = re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", PAGE)
    assert len(paths) > 25
    assert [path for path in paths if not (PACKAGE / path).exists()] == []


def test_the_way_of_a_token_has_ten_steps():
    assert re.findall(r"^(\d+)\. \*\*", PAGE, re.M) == [str(step) for step in range(1, 11)]


def test_links_to_headings_lead_to_one():
    for page, heading in re.findall(r"\]\(([^)#\s]+)#([\w-]+)\)", PAGE):
        headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / page).read_text("utf-8"), re.M)
        assert heading in [title.lower().replace(" ", "-") for title in headings]


def test_the_picture_is_what_the_script_makes():
    assert make_architecture.SVG.read_text("utf-8") == make_architecture.svg(), "run python docs/make_architecture.py"


def test_the_picture_holds_every_layer_of_the_contract_and_every_part_of_the_engine():
    picture = make_architecture.SVG.read_text("utf-8")
    layers = [name for row in make_architecture.contract_rows() for name in row]
    parts = [p for p in (PACKAGE / "engine").iterdir() if not p.name.startswith("__")]
    assert len(layers) > 15
    assert len(parts) > 5
    for name in [*layers, *(f"{part.name}/" if part.is_dir() else part.name for part in parts)]:
        assert f">{name}</text>" in picture


def test_an_import_that_follows_from_two_others_is_left_out():
    graph = grimp.ImportGraph()
    for module in ("house", "house.roof", "house.wall", "house.ground"):
        graph.add_module(module)
    for importer, imported in (("roof", "wall"), ("wall", "ground"), ("roof", "ground")):
        graph.add_import(importer=f"house.{importer}", imported=f"house.{imported}")
    edges = make_architecture.imports(graph, "house")
    assert edges == {("roof", "wall"), ("wall", "ground")}
    assert make_architecture.levels(["ground", "roof", "wall"], edges) == [["roof"], ["wall"], ["ground"]]
