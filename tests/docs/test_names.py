"""Names and first lines say what they hold: no local name is a plain English function word, no docstring a riddle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "tokensieve"
FILES = sorted(SOURCE.rglob("*.py"))
# words that name nothing: a reader must look up what they hold
NOWHERE = """said heard told asked wanted found gone rest both mine theirs ours here there see alike of own every
nothing made everyone nobody somebody whoever what who which how now again"""
NOT_IN_THE_ENGINE = """each other others real left seen given shown taken done lost stood stays near known one where
named drawn"""
RIDDLE = re.compile(r"(What|Where|Whose|Who|How|That|Those)\b")
PERSONS = re.compile(r"\b([Nn]obody|[Ss]omebody|[Ww]hoever|[Ee]verybody)\b")


def local_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield parameters and variables of functions; fields of classes are spelled as users write them in specs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(
            node, ast.FunctionDef | ast.Lambda | ast.GeneratorExp | ast.ListComp | ast.DictComp | ast.SetComp
        ):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    yield inner.id, inner.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_local_names_say_what_they_hold(file):
    in_the_engine = "engine" in file.relative_to(SOURCE).parts
    banned = NOWHERE.split() + NOT_IN_THE_ENGINE.split() * in_the_engine
    assert not [f"line {line}: {name}" for name, line in local_names(ast.parse(file.read_text())) if name in banned]


def docstrings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_docstrings_are_plain(file):
    for text in docstrings(ast.parse(file.read_text())):
        assert not RIDDLE.match(text), text.splitlines()[0]
        assert not PERSONS.search(text), text
