"""``demand-cover`` against its formula by hand, and the properties of its objective."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tokensieve import parse
from tokensieve.methods import demand_cover
from tokensieve.tokens import ByLayer, ConnectorTokens, UserText

SEEDS = st.integers(0, 10_000)


def drawn(seed: int, batch: int = 1, total: int = 18, words: int = 3) -> ConnectorTokens:
    g = torch.Generator().manual_seed(seed)
    attention = torch.rand(batch, total, generator=g)
    return ConnectorTokens(
        features=torch.randn(batch, total, 6, generator=g),
        cls_attention=ByLayer({22: attention / attention.sum(-1, keepdim=True)}, 24),
        user_text=UserText(torch.randn(batch, words, 6, generator=g), torch.ones(batch, words, dtype=torch.bool)),
    )


def kept(image: ConnectorTokens, budget: int, **parameters: float) -> list[list[int]]:
    (method,) = parse("demand-cover")
    return replace(method, **parameters).reduce(replace(image, budget=budget)).anchors.tolist()


def by_hand(image: ConnectorTokens) -> tuple[list[float], list[list[float]]]:
    """Demand of each token and how well token j covers token i, ``[i][j]``, written out from the page's formulas."""
    rows, words = image.features[0].double(), image.user_text.features[0].double()
    attention, n = image.cls_attention[22][0].double(), image.total
    mean = sum(rows) / n
    salience = [float(attention[i] * (rows[i] - mean).dot(rows[i] - mean)) ** 0.75 for i in range(n)]
    relevance = [0.0] * n
    for word in words:
        powers = [float(torch.exp(cosine_similarity(word, row, dim=0) / 0.02)) for row in rows]
        relevance = [r + power / sum(powers) for r, power in zip(relevance, powers, strict=True)]
    weighted = [s * r for s, r in zip(salience, relevance, strict=True)]
    demand = [s / sum(salience) + w / sum(weighted) for s, w in zip(salience, weighted, strict=True)]
    covers = [[max(0.0, float(cosine_similarity(i - mean, j - mean, dim=0))) ** 6 for j in rows] for i in rows]
    return demand, covers


def covered(demand: list[float], covers: list[list[float]], chosen: list[int]) -> float:
    best = [max((row[j] for j in chosen), default=0.0) for row in covers]
    return sum(d * b for d, b in zip(demand, best, strict=True))


@settings(max_examples=12, deadline=None)
@given(SEEDS, st.integers(1, 6))
def test_greedy_by_hand(seed: int, budget: int) -> None:
    image = drawn(seed)
    demand, covers = by_hand(image)
    chosen: list[int] = []
    gains = []
    for _ in range(budget):
        others = [j for j in range(image.total) if j not in chosen]
        value = {j: covered(demand, covers, [*chosen, j]) for j in others}
        gains.append(max(value.values()) - covered(demand, covers, chosen))
        chosen.append(max(value, key=lambda j: value[j]))
    assert kept(image, budget) == [sorted(chosen)]
    # no gain is negative, and none exceeds the one before: lazy updates are right
    assert all(later <= earlier + 1e-12 for earlier, later in zip([2.0, *gains], gains, strict=False))
    assert min(gains) >= 0


@settings(max_examples=12, deadline=None)
@given(SEEDS)
def test_the_order_of_the_tokens_does_not_matter(seed: int) -> None:
    image = drawn(seed)
    order = torch.randperm(image.total, generator=torch.Generator().manual_seed(seed))
    attention = ByLayer({22: image.cls_attention[22][:, order]}, 24)
    permuted = replace(image, features=image.features[:, order], cls_attention=attention)
    assert sorted(order[kept(permuted, 5)[0]].tolist()) == kept(image, 5)[0]


@settings(max_examples=12, deadline=None)
@given(SEEDS)
def test_demand_sums_to_one_for_each_half(seed: int) -> None:
    image = drawn(seed, batch=2)
    method = parse("demand-cover(text_weight=0.5)")[0]
    demand = method.demand(image, method.differences(image.features))
    torch.testing.assert_close(demand.sum(-1), torch.full((2,), 1.5))
    assert bool((demand > 0).all())


def test_a_batch_row_keeps_what_it_keeps_alone() -> None:
    image, short = drawn(1, batch=2, words=4), drawn(2, words=2)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    text = torch.stack([image.user_text.features[0], torch.cat([short.user_text.features[0], torch.ones(2, 6)])])
    attention = torch.cat([image.cls_attention[22][:1], short.cls_attention[22]])
    both = replace(
        image,
        features=torch.cat([image.features[:1], short.features]),
        cls_attention=ByLayer({22: attention}, 24),
        user_text=UserText(text, mask),
    )
    assert kept(both, 6)[1:] == kept(short, 6)


def scene(objects: Tensor) -> ConnectorTokens:
    """An image of 12 equal tokens of background and four equal tokens of each object, each attended to alike."""
    features = torch.cat([torch.full((12, 8), 0.1), objects.repeat_interleave(4, 0)])[None]
    total = features.shape[1]
    text = UserText(objects[None, -1:], torch.ones(1, 1, dtype=torch.bool))
    return ConnectorTokens(
        features=features, cls_attention=ByLayer({22: torch.full((1, total), 1 / total)}, 24), user_text=text
    )


def test_equal_tokens_are_kept_once() -> None:
    image = scene(torch.eye(8)[:3])
    assert [(i - 12) // 4 for i in kept(image, 3)[0]] == [0, 1, 2]


@pytest.mark.parametrize(("weight", "first"), [(1.0, 2), (0.0, 0)])
def test_the_words_choose_among_equals(weight: float, first: int) -> None:
    """The word equals the last of three objects that the image shows alike; without words the first comes first."""
    (chosen,) = kept(scene(torch.eye(8)[:3]), 1, text_weight=weight)
    assert [(i - 12) // 4 for i in chosen] == [first]


def test_an_image_of_one_colour() -> None:
    image = replace(drawn(0), features=torch.ones(1, 18, 6))
    assert len(set(kept(image, 5)[0])) == 5


def test_large_images_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    image = drawn(5, batch=2, total=40)
    expected = kept(image, 9)
    monkeypatch.setattr(demand_cover, "CHUNK", 8)
    assert kept(image, 9) == expected
