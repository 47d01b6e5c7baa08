"""The package behaves as Python tools expect: ``python -m``, submodule imports, ``pydoc``, ``dir``."""

import inspect
import pydoc
import subprocess
import sys

import pytest

import tokensieve
from tests.cli.calling import ENVIRONMENT, run


def test_python_m_is_the_command() -> None:
    program = [sys.executable, "-m", "tokensieve"]
    done = subprocess.run([*program, "--help"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout
    assert done.stdout.splitlines()[3:] == run("--help").out.splitlines()[3:]
    refused = subprocess.run([*program, "comapre"], capture_output=True, text=True, env=ENVIRONMENT)
    assert refused.returncode == 2
    assert "comapre" in refused.stderr


def test_a_submodule_can_be_imported_under_another_name() -> None:
    import tokensieve.engine.connector.decide as d

    assert inspect.ismodule(d)
    assert d.__name__ == "tokensieve.engine.connector.decide"


@pytest.mark.parametrize("name", ["tokensieve.engine.llm", "tokensieve.check.laws", "tokensieve.evaluate.plan"])
def test_pydoc_finds_a_submodule(name: str) -> None:
    assert inspect.ismodule(pydoc.locate(name))


def test_pydoc_finds_a_public_name() -> None:
    assert pydoc.locate("tokensieve.attach") is tokensieve.attach


def test_dir_lists_the_public_names() -> None:
    assert "attach" in dir(tokensieve)
    assert set(tokensieve.__all__) <= set(dir(tokensieve))


@pytest.mark.parametrize("name", ["attach", "list_methods", "parse", "register"])
def test_a_public_function_is_callable(name: str) -> None:
    assert inspect.isfunction(getattr(tokensieve, name))


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'tokensieve' has no attribute 'atach'"):
        _ = tokensieve.atach
