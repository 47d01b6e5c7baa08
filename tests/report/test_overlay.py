"""Overlays show the decision: bright where kept, dim where dropped, one tint per merged slot."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tokensieve.reduction import Mixing, Reduction
from tokensieve.report.overlay import as_seen, overlay, sheet

GRID = (4, 6)
GREY = Image.new("RGB", (60, 40), (200, 200, 200))


def centres(picture: Image.Image) -> np.ndarray:
    """Return the mean colour near the centre of each cell, beside the anchor dot, `[4, 6, 3]`."""
    pixels = np.asarray(picture, float)
    cell = pixels.shape[0] // GRID[0]
    assert pixels.shape == (GRID[0] * cell, GRID[1] * cell, 3)
    return pixels[cell // 4 :: cell, cell // 4 :: cell]


def test_dropped_cells_are_dim_and_kept_ones_untouched() -> None:
    kept = [0, 7, 23]
    shown = centres(overlay(GREY, Reduction(24, torch.tensor(kept), grid=GRID), side=240)).reshape(24, 3)
    assert (shown[kept] == 200).all()
    assert (shown[[i for i in range(24) if i not in kept]] < 140).all()


def test_nothing_kept_is_all_dim() -> None:
    nothing = Reduction(24, torch.empty(0, dtype=torch.int64), grid=GRID)
    assert (centres(overlay(GREY, nothing, side=240)) < 140).all()


def test_merged_slots_that_touch_have_different_tints() -> None:
    slot = torch.arange(24) % 6 // 3  # the left half and the right half, one token each
    halves = Reduction(24, torch.tensor([1, 4]), Mixing(slot, torch.arange(24), torch.full((24,), 1 / 12)), grid=GRID)
    shown = centres(overlay(GREY, halves, side=240))
    left, right = shown[:, :3].reshape(-1, 3), shown[:, 3:].reshape(-1, 3)
    assert np.ptp(left, axis=0).max() == 0
    assert np.ptp(right, axis=0).max() == 0
    assert np.abs(left[0] - right[0]).max() > 20
    assert (left.max(-1) > 150).all()


def test_an_image_kept_whole_is_unchanged() -> None:
    assert (np.asarray(overlay(GREY, Reduction.identity(24, grid=GRID), side=240)) == 200).all()


def test_tokens_without_a_grid_are_refused() -> None:
    some = torch.tensor([0, 7])
    with pytest.raises(ValueError, match="no grid"):
        overlay(GREY, Reduction(24, some))
    with pytest.raises(ValueError, match="one image"):
        overlay(GREY, Reduction(24, some.expand(2, -1), grid=GRID))


def test_as_seen_is_the_centre_crop_of_the_image_processor() -> None:
    crops = SimpleNamespace(do_center_crop=True, size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})
    wide = Image.new("RGB", (80, 40))
    wide.paste((255, 0, 0), (20, 0, 60, 40))
    view = as_seen(wide, crops)
    assert view.size == (40, 40)
    assert view.getcolors() == [(1600, (255, 0, 0))]
    assert as_seen(wide, object()) is wide


def test_a_sheet_holds_every_picture() -> None:
    page = sheet([("one", GREY), ("two", GREY), ("three", GREY)], columns=2, gap=10)
    assert page.width == 2 * 60 + 3 * 10
    assert (np.asarray(page) == 200).all(-1).sum() >= 3 * 60 * 40
