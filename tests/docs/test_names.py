"""Names and first lines say what they hold: no local name is a plain English function word, no docstring a riddle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

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


def test_local_names_say_what_they_hold():
    found = []
    for file in FILES:
        in_the_engine = "engine" in file.relative_to(SOURCE).parts
        banned = NOWHERE.split() + NOT_IN_THE_ENGINE.split() * in_the_engine
        names = local_names(ast.parse(file.read_text("utf-8")))
        found += [f"{file.relative_to(SOURCE)}:{line}: {name}" for name, line in names if name in banned]
    assert not found


def docstrings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""


def test_docstrings_are_plain():
    texts = [text for file in FILES for text in docstrings(ast.parse(file.read_text("utf-8")))]
    assert len(texts) > 1000
    assert not [text for text in texts if RIDDLE.match(text) or PERSONS.search(text)]
