"""The README and the pages say what is true: catalogues, commands, code, links, numbers."""

import re
from pathlib import Path

import pytest

import tokensieve
from tests.cli.calling import run_many
from tokensieve import reference
from tokensieve.models.catalogue import families

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = ("models.md", "start.md", "faq.md", "recipes.md")


def test_the_catalogue_is_the_registry() -> None:
    index = (ROOT / "docs" / "methods" / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| \[`([^`]+)`\].*\| (?:\[([\d.v]+)\]\(\S+\)|(baseline|this project)) \|$", index, re.M)
    assert {name: f"arXiv:{paper}" if paper else origin for name, paper, origin in rows} == {
        info.name: info.paper for info in tokensieve.list_methods()
    }


def test_the_table_of_models_names_every_model_type() -> None:
    table = (ROOT / "docs" / "models.md").read_text("utf-8").partition("## Loading")[0]
    types = {name for family in families() for name in family.model_types}
    assert len(types) > 20
    assert {name for name in types if f"`{name}`" not in table} == set()


def test_the_numbers_are_those_of_the_results() -> None:
    """Each row of the README's table joins two rows of the results, at 36 and at 16 tokens an image."""
    page = (ROOT / "docs" / "results.md").read_text("utf-8").partition("## By question type")[2]
    measured = set(re.findall(r"^\| `(.+?)` \| ([\d.]+) \| ([^|]+) \| (\d+%) ", page, re.M))
    rows = re.findall(r"^\| `(.+?)`[^|]* \| ([^|]+) \| (\d+%) \| ([^|]+) \| (\d+%) \|$", README, re.M)
    assert len(rows) > 5
    for method, at_36, flops_36, at_16, flops_16 in rows:
        # tokens of a prompt: one question in thirteen is about two images
        counts = ("155.1", "155.1") if method == "full" else ("38.77", "17.23")
        assert {(method, counts[0], at_36, flops_36), (method, counts[1], at_16, flops_16)} <= measured


def test_commands_exist_with_their_options() -> None:
    pages = "\n".join([README, *((ROOT / "docs" / name).read_text("utf-8") for name in PAGES)])
    lines = re.findall(r"^(?:\.venv/bin/)?tokensieve ([a-z].+?)(?: +#.*)?$", pages, re.M)
    commands = {line.split()[0] for line in lines}
    helped = run_many({name: [name, "--help"] for name in commands})
    for line in lines:
        outcome = helped[line.split()[0]]
        assert outcome.code == 0
        assert all(option in outcome.out for option in re.findall(r"--[\w-]+", line))
    for target in re.findall(r"`make (\w+)`", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.M)


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text("utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_links_to_headings_lead_to_one() -> None:
    """The anchor of a heading on a code-hosting page: small letters, no punctuation, hyphens for spaces."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\((?!https?:)([^)\s]*\.md#[^)\s]+|#[^)\s]+)\)", page.read_text("utf-8"))
    ]
    assert len(links) > 40
    for page, link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.M)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{page.name}: {link}"


@pytest.mark.skipif(not (reference.path() / "model.safetensors").is_file(), reason="no trained weights yet")
def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {})
    assert "?" in capsys.readouterr().out
