"""M3's nested pooling is ``pool`` where its windows fill the grid; elsewhere it cuts the last rows and columns off."""

from math import isqrt

import torch
from torch.nn.functional import avg_pool2d

from tests.golden.vectors import CLOSE, cases, load
from tokensieve import parse
from tokensieve.tokens import VisualTokens


def pooled(rows, keep):
    side = isqrt(rows.shape[1])
    (pool,) = parse(f"pool(keep={keep})")
    return pool(VisualTokens(rows, grid=(side, side), budget=keep))


@cases("m3_pool")
def test_the_authors_scales(name):
    given, expected, hp = load("m3_pool", name)
    reduction = pooled(given["x"], hp["scale"])
    for row, decision in enumerate(reduction):
        torch.testing.assert_close(decision.apply(given["x"][row]), expected["out"][row], **CLOSE)


def test_a_scale_that_does_not_fill_the_grid():
    """The page says: 5 of 144 tokens are 2 x 2 windows of 5 x 5 in M3, and 2 x 2 cells of 6 x 6 in ``pool``."""
    rows = torch.randn(1, 144, 3, generator=torch.Generator().manual_seed(0))
    grid = rows.view(1, 12, 12, 3).permute(0, 3, 1, 2)
    theirs, ours = (avg_pool2d(grid, size).flatten(2).transpose(1, 2)[0] for size in (5, 6))
    found = pooled(rows, 5)[0].apply(rows[0])
    torch.testing.assert_close(found, ours, **CLOSE)
    assert not torch.allclose(found, theirs, atol=0.01)
