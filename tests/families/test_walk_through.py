"""The walk-through of CONTRIBUTING.md, followed: the family written there, in the folder, on a model of its shape."""

import re
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import tokensieve
import tokensieve.models
from tests.families.test_matrix import METHODS, collate
from tests.support import models, prompts
from tokensieve.models import catalogue, family_of

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
KNOWN = "cohere2-vision"  # a SigLIP tower, 2x2 patches per token: what the guide's family describes


@pytest.fixture
def novel(tmp_path, monkeypatch):
    """A model of the new type, after the guide's file was put into the folder of families."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.S)
    (code,) = (block for block in blocks if "class NovelVL" in block)
    (tmp_path / "novel_vl.py").write_text(dedent(code), "utf-8")
    monkeypatch.setattr(tokensieve.models, "__path__", [*tokensieve.models.__path__, str(tmp_path)])
    catalogue.families.cache_clear()
    model = models.build(KNOWN)
    model.config.spatial_merge_size = 2
    monkeypatch.setattr(type(model.config), "model_type", "novel_vl")
    yield model
    catalogue.families.cache_clear()
    sys.modules.pop("tokensieve.models.novel_vl", None)


@pytest.mark.parametrize("kind", ["attention", "features", "text", "merging"])
def test_the_family_of_the_guide_works(novel, kind, monkeypatch):
    inputs = collate(KNOWN, "one-and-two")

    def run(model):
        with tokensieve.attach(model, METHODS[kind]) as sieve:
            out = model.generate(**inputs, max_new_tokens=3, **prompts.GREEDY)
        return [*out.logits, *(r.kept for row in sieve.last for r in row)]

    assert family_of(novel).title == "Novel-VL"
    written = run(novel)
    monkeypatch.undo()  # the same model by its own name: an adapter that the matrix has tested
    catalogue.families.cache_clear()
    assert family_of(novel).name != "novel-vl"
    assert all(torch.equal(a, b) for a, b in zip(written, run(novel), strict=True))
