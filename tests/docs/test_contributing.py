"""CONTRIBUTING.md, followed: its method works outside the tree and in it, and its files and names exist."""

import re
import sys
from pathlib import Path

import pytest
import torch

import tokensieve
from tokensieve import methods, reference, tokens
from tokensieve.methods import registry
from tokensieve.models.family import Family
from tokensieve.reference.benchmark import benchmark

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
sys.path.append(str(ROOT / "docs"))
import make_methods  # noqa: E402


@pytest.fixture
def method_file(tmp_path: Path) -> Path:
    """The method of the page, in a file."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "class Loudest" in block)
    path = tmp_path / "loudest.py"
    path.write_text(code.replace('"loudest"', '"loudest-of-the-page"'), "utf-8")  # a reader's own may be in the tree
    return path


@pytest.fixture
def in_the_tree(method_file: Path, monkeypatch: pytest.MonkeyPatch):
    """The registry, after the file was put into the folder of methods."""
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(method_file.parent)])
    tokensieve.list_methods()
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    registry._load.cache_clear()
    yield
    sys.modules.pop("tokensieve.methods.loudest", None)
    registry._load.cache_clear()


def generated(method: str):
    """The reduction of one benchmark image by a method in the bundled model, in an ordinary call of ``generate``."""
    model, processor = reference.load()
    row = benchmark(scenes=1)[0]
    content = [{"type": "image", "image": row.image}, {"type": "text", "text": row.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with tokensieve.attach(model, method, processor=processor) as sieve, torch.inference_mode():
        answer = model.generate(**inputs, max_new_tokens=2)
        features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    assert answer.shape[1] > inputs["input_ids"].shape[1]
    return sieve.last[0][0], features


def test_the_method_of_the_page_works_from_its_file(method_file):
    reduction, features = generated(f"{method_file}:Loudest(keep=36)")
    assert reduction.total == 144
    assert reduction.kept.tolist() == sorted(features.float().norm(dim=-1).topk(36).indices.tolist())


def test_the_method_of_the_page_shares_a_budget_by_score(method_file):
    assert tokensieve.parse(f"{method_file}:Loudest")[0].by_score


def test_in_the_tree_a_method_is_one_file(in_the_tree):
    (info,) = (info for info in tokensieve.list_methods() if info.name == "loudest-of-the-page")
    assert info.stage == "connector"
    reduction, _ = generated("loudest-of-the-page(keep=36)")
    assert reduction.slots == 36


def test_the_page_of_a_method_is_made_from_its_docstring(in_the_tree):
    page = make_methods.pages()["loudest-of-the-page.md"]
    assert "Keep the tokens with the largest norm." in page


def test_the_files_on_the_page_exist():
    paths = re.findall(r"`((?:src|tests|docs)/[\w./-]*\w/?)`", PAGE)
    assert len(paths) > 8
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_names_on_the_page_exist():
    section = PAGE.partition("2. Override the parts that differ")[2].partition("\n3. ")[0]
    hooks = re.findall(r"`(\w+)`[:,]", section)
    assert len(hooks) > 8
    assert [hook for hook in hooks if not hasattr(Family, hook)] == []
    modules = (methods, tokens)
    classes = re.findall(r"`(\w+(?:Tokens|Needs|Method))`", PAGE)
    assert len(classes) > 8
    assert [name for name in classes if not any(hasattr(module, name) for module in modules)] == []
