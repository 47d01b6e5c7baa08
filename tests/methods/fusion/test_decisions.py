"""PuMer's decisions against the same law written as loops over one row, and the pieces they are made of."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tokensieve import parse
from tokensieve.crossmodal import CrossModal, Merge, ModalityStream
from tokensieve.ops import attention, epsilon_attention, keep_best, mask_bias

HEADS, WIDTH = 2, 6


def scene(words, tokens, seed, wide=0, high=0):
    """One layer's evidence for rows with these numbers of words and image tokens; padding on the right."""
    g = torch.Generator().manual_seed(seed)
    rows, wide, high = len(words), max(wide, *words), max(high, *tokens)
    query, text_key = (torch.randn(rows, HEADS, wide, WIDTH, generator=g) for _ in range(2))
    image_key = torch.randn(rows, HEADS, high, WIDTH, generator=g)
    masks = [
        (torch.arange(size) < torch.tensor(counts)[:, None]).float() for counts, size in ((words, wide), (tokens, high))
    ]
    key = torch.cat([text_key, image_key], 2)
    bias = mask_bias(torch.cat(masks, 1), key.dtype)
    streams = [ModalityStream(mask, tuple(counts)) for mask, counts in zip(masks, (words, tokens), strict=True)]
    return CrossModal(*streams, query, key, bias, text_key, image_key)


def by_hand(method, seen, row):
    """The law on one row: original tokens of each slot, for text and image."""
    t, m = seen.text.counts[row], seen.image.counts[row]
    query, text_key = seen.query[row, :, :t], seen.text_key[row, :, :t]
    image_key = seen.image_key[row, :, :m]
    scores = []
    for i in range(m):
        if method.relevance in ("key_key", "query_key"):
            text = text_key if method.relevance == "key_key" else query
            scores.append(sum(float(text.mean(0)[j] @ image_key.mean(0)[i]) for j in range(t)) / t)
            continue
        total = 0.0
        for h in range(1 if method.relevance == "first_head" else HEADS):
            for j in range(t):
                every = torch.cat([text_key[h], image_key[h]]) @ query[h, j] / math.sqrt(WIDTH)
                total += float(every.softmax(0)[t + i]) / t
        scores.append(total)
    keep = max(m - round(method.prune * m), 1)
    order = sorted(range(m), key=lambda i: -scores[i])
    if not method.official_order:
        order = sorted([0, *[i for i in order if i][: keep - 1]])
    image = merged(order[:keep], image_key.mean(0), round(method.merge * m), method.official_order)
    return merged(list(range(t)), text_key.mean(0), round(method.merge_text * t), method.official_order), image


def merged(kept, metric, pairs, official):
    pairs = min(pairs, (len(kept) - 1) // 2)
    slots = {place: [token] for place, token in enumerate(kept)}
    proposals = []
    for a in range(2, len(kept), 2):
        near = {b: float(cosine_similarity(metric[kept[a]], metric[kept[b]], 0)) for b in range(1, len(kept), 2)}
        best = max(near, key=near.get)
        proposals.append((near[best], a, best))
    for _, a, b in sorted(proposals, reverse=True)[:pairs]:
        slots[b] += slots.pop(a)
    places = sorted(slots, key=lambda place: (place % 2, place) if official and pairs else place)
    return [sorted(slots[place]) for place in places]


def slots(merge, row):
    """Original tokens of each slot of one row; the identity where nothing was decided."""
    to = merge.destinations()[row].tolist()
    return [[token for token, slot in enumerate(to) if slot == s] for s in range(merge.counts[row])]


@pytest.mark.parametrize("official_order", [False, True])
@pytest.mark.parametrize("relevance", ["mean_head", "first_head", "key_key", "query_key"])
@pytest.mark.parametrize(
    ("prune", "merge", "merge_text"), [(0.2, 0.3, 0.25), (0.5, 0.5, 0.5), (0.3, 0, 0), (0, 0.4, 0)]
)
def test_as_by_hand(relevance, official_order, prune, merge, merge_text):
    shares = {"prune": prune, "merge": merge, "merge_text": merge_text}
    (method,) = parse("pumer", relevance=relevance, official_order=official_order, **shares)
    seen = scene([9, 4, 1, 6], [13, 7, 16, 2], seed=round(10 * prune))
    decided = method.reduce_pair(seen)
    for row in range(4):
        for found, wanted in zip(decided, by_hand(method, seen, row), strict=True):
            assert found is None or slots(found, row) == wanted
            assert found is not None or wanted == [[i] for i in range(len(wanted))]


def test_padding_takes_no_part():
    (method,) = parse("pumer")
    tight, loose = scene([5], [12], seed=3), scene([5], [12], seed=3)
    padded = scene([5], [12], seed=4, wide=8, high=20)
    for name in ("query", "text_key"):
        getattr(padded, name)[:, :, :5] = getattr(loose, name)
    padded.image_key[:, :, :12] = loose.image_key
    key = torch.cat([padded.text_key, padded.image_key], 2)
    padded = CrossModal(padded.text, padded.image, padded.query, key, padded.bias, padded.text_key, padded.image_key)
    for a, b in zip(method.reduce_pair(tight), method.reduce_pair(padded), strict=True):
        assert slots(a, 0) == slots(b, 0)


def test_average_of_members_and_sizes():
    every = torch.arange(6).expand(1, -1)
    metric = torch.tensor([[[1.0, 0], [0, 1], [0, 2], [1, 1], [0.1, 1], [1, 0]]])  # 2 and 4 resemble 1
    merge = Merge.of(every, [6], metric, [2])
    rows = torch.arange(6.0)[None, :, None]
    assert merge.apply(rows)[0, :, 0].tolist() == pytest.approx([0, (1 + 2 + 4) / 3, 3, 5])
    size = torch.tensor([[1.0, 2, 1, 1, 3, 1]])
    assert merge.apply(rows, size)[0, :, 0].tolist() == pytest.approx([0, (2 + 2 + 12) / 6, 3, 5])
    assert merge.sizes(size).tolist() == [[1, 6, 1, 1]]
    assert merge.apply(rows.bfloat16()).dtype == torch.bfloat16


def test_keep_best_of_each_row():
    scores = torch.tensor([[3.0, 1, 2, 5], [1, 4, -torch.inf, -torch.inf]])
    indices, real = keep_best(scores, [3, 1])
    assert indices[real].tolist() == [0, 2, 3, 1]
    indices, real = keep_best(scores, [3, 1], in_place=False)
    assert indices[real].tolist() == [3, 0, 2, 1]


def test_a_fractional_mask_multiplies():
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, n, 4, generator=g) for n in (3, 5))
    mask = torch.tensor([[1, 0.5, 0, 1, 0.25]])
    weight = (query @ key.transpose(-1, -2) / 2).exp() * mask
    expected = weight / weight.sum(-1, keepdim=True)
    bias = mask_bias(mask, torch.float32)
    assert torch.allclose(attention(query, key, bias), expected, atol=1e-6)
    assert torch.allclose(epsilon_attention(query, key, bias), expected, atol=1e-5)
    own = mask_bias(mask, torch.float32, queries=3)
    assert own[0, 0].diagonal().tolist() == [0, 0, 0]
    assert mask_bias(mask, torch.float16).isfinite().all()
