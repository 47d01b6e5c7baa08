"""The discovered order of a vision encoder's rows: the right one on any image, or a refusal."""

from types import SimpleNamespace

import pytest
import torch

import tokensieve
from tests.support import models, prompts
from tokensieve import Refusal
from tokensieve.models import family_of, patch_order
from tokensieve.models.family import EncodeCall
from tokensieve.models.patch_order import discover_rules, unit_of_row


def order(name, height, width, side):
    """Return the token of each patch of an image of (height, width) tokens, side x side patches each."""
    squares = torch.arange(height * width).repeat_interleave(side * side)
    patches = torch.arange(height * width).view(height, width)
    patches = patches.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return {
        "in order": squares,
        "raster": patches.flatten(),
        "flipped rows": patches.flip(0).flatten(),
        "flipped columns": patches.flip(1).flatten(),
        "transposed": patches.T.flatten(),
        "windows": torch.arange(height * width).view(height // 2, 2, width // 2, 2).transpose(1, 2).flatten()[squares],
        "permuted": squares[torch.randperm(len(squares), generator=torch.Generator().manual_seed(0))],
        "two tokens swapped": squares.where(squares > 1, 1 - squares),
    }[name]


NAMES = ("in order", "raster", "flipped rows", "flipped columns", "transposed", "windows", "permuted")


@pytest.mark.parametrize("unseen", [0, 0.2], ids=["every", "most"])
@pytest.mark.parametrize("cls", [0, 1])
@pytest.mark.parametrize("size", [(2, 2, 2), (2, 4, 2), (4, 2, 2), (8, 2, 2), (4, 6, 2), (6, 6, 1), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "two tokens swapped"])
def test_an_order_is_found_right_or_refused(monkeypatch, name, size, cls, unseen):
    """Also where tokens pass over some of their patches."""
    height, width, side = size
    true = torch.cat([torch.full((cls,), -1), order(name, height, width, side)])
    if name == "two tokens swapped" and len(true) > patch_order.LEAST_ROWS:
        pytest.skip("not all rows are disturbed")
    generator, tokens = torch.Generator().manual_seed(1), height * width

    def changed(model, tower, call, rows, chosen):
        shown = true[chosen][true[chosen] >= 0]
        passed_over = torch.rand(tokens, generator=generator) < unseen
        return torch.zeros(tokens, dtype=torch.bool).index_fill(0, shown, True) & ~passed_over

    monkeypatch.setattr(patch_order, "_tokens_changed", changed)
    inputs = {"spatial_shapes": torch.tensor([[height * side, width * side]])}
    tower, call = SimpleNamespace(config=SimpleNamespace()), EncodeCall(inputs)
    try:
        rules = discover_rules(None, tower, call, len(true), [tokens])
    except Refusal:
        by_rule = [unit_of_row(rule, tower, inputs, len(true), [tokens]) for rule in patch_order.RULES]
        known = any(unit is not None and torch.equal(unit, true) for unit in by_rule)
        assert unseen or not known, "an order that a rule describes was refused"
        return
    for rule in rules:
        assert torch.equal(unit_of_row(rule, tower, inputs, len(true), [tokens]), true)


def test_a_small_first_image_does_not_fix_the_order_of_larger_ones(monkeypatch):
    """An image of one window has its squares in order, whatever the order of windows: Qwen2.5-VL as an unknown type."""
    name, spec = "qwen2.5-vl", "vtc-cls(keep=5)"
    small, large = (prompts.sample(name, (3, 4), (shape,), 5) for shape in ((2, 2), (4, 6)))

    def run():
        model = models.tiny_model(name)
        with torch.no_grad(), tokensieve.attach(model, spec) as sieve:
            for sample in (small, large):
                model(**prompts.collate(name, [sample]))
            return sieve.last[0][0].kept.tolist()

    expected = run()
    monkeypatch.setattr(type(models.tiny_model(name).config), "model_type", "novel_vlm")
    assert "untested" in family_of(models.tiny_model(name)).title
    assert run() == expected
