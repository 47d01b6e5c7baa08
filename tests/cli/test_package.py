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


NEEDS_TORCH_ALONE = """
import importlib.abc, sys
import torch
from importlib.metadata import requires
from packaging.requirements import Requirement

libraries = {Requirement(line).name for line in requires("tokensieve")} - {"torch", "tokensieve"}
hidden = libraries - {"pillow"} | {"PIL", "scipy", "sklearn", "skimage", "huggingface_hub", "tokenizers"}
for name in [name for name in sys.modules if name.partition(".")[0] in hidden]:
    del sys.modules[name]


class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)


sys.meta_path.insert(0, Hidden())
import tokensieve.ops, tokensieve.reduction
from tokensieve.methods import list_methods, parse
from tokensieve.tokens import ConnectorTokens

assert hidden > {"transformers", "numpy", "safetensors", "typer"}, hidden
assert len(list_methods()) > 40
features = torch.randn(2, 9, 4)
(method,) = parse("divprune", keep=3)
assert method(ConnectorTokens(features)).apply(features).shape == (2, 3, 4)
assert not hidden & {name.partition(".")[0] for name in sys.modules}
try:
    import transformers
except ModuleNotFoundError:
    print("torch alone")
"""


def test_the_maths_and_the_methods_need_torch_alone() -> None:
    done = subprocess.run([sys.executable, "-c", NEEDS_TORCH_ALONE], capture_output=True, text=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (0, "torch alone\n"), done.stderr


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
