"""What each method decides, restated from its paper in plain steps; a rule sees a `by_hand.Sequence` and one image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.decoder_by_hand import Sequence, attend, rotary

Decision = tuple[Tensor, list[int]]


@dataclass(frozen=True)
class Rule:
    """``decide(sequence, image, decoder, count)`` before each of ``stages``; ``counts``: what a stage leaves of N0."""

    stages: list[int]
    decide: Callable
    counts: Callable[[int], list[int]] | None = None

    def __call__(self, stage: int, sequence: Sequence, image: int, decoder) -> Decision:
        size = len(sequence.images[image])
        count = None
        if self.counts is not None:
            count = self.counts(len(sequence.entry_images[image]))[stage]
            if count >= size:
                return torch.eye(size), list(range(size))
        return self.decide(sequence, image, decoder, count)


def pick(indices, size: int) -> Decision:
    anchors = sorted(int(i) for i in indices)
    return torch.eye(size)[anchors], anchors


def best(scores: Tensor, count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:count]


def last_row(sequence: Sequence, image: int) -> Tensor:
    """Attention of the last prompt token in the block that ran last, mean over heads."""
    return sequence.seen[-1].attention[:, sequence.prompt - 1, sequence.images[image]].mean(0)


def word_rows(sequence: Sequence, image: int) -> Tensor:
    """`[H, M, N]`."""
    return sequence.seen[-1].attention[:, sequence.words][:, :, sequence.images[image]]


def fastv(sequence, image, decoder, count):
    scores = last_row(sequence, image)
    return pick(best(scores, count), len(scores))


def window_fastv(windows):
    def decide(sequence, image, decoder, count):
        scores, chosen, groups = last_row(sequence, image), [], min(windows, count)
        for g in range(groups):
            start, end = len(scores) * g // groups, len(scores) * (g + 1) // groups
            quota = count * (g + 1) // groups - count * g // groups
            chosen += [start + i for i in best(scores[start:end], quota)]
        return pick(chosen, len(scores))

    return decide


def pyramiddrop(sequence, image, decoder, count):
    number = len(sequence.seen)
    rows = decoder.layers[number].input_layernorm(sequence.rows)
    _, weights, _ = attend(decoder, number, sequence, rows)
    scores = weights[:, sequence.prompt - 1, sequence.images[image]].mean(0)
    return pick(best(scores, count), len(scores))


def vtw(sequence, image, decoder, count):
    return pick([], len(sequence.images[image]))


def text_correlation(sequence, image, decoder, count):
    scores = word_rows(sequence, image).mean((0, 1))
    return pick(best(scores, count), len(scores))


def illava(sequence, image, decoder, count):
    scores = last_row(sequence, image)
    order = best(scores, len(scores))
    merged = order[count - 1 :]
    anchors = sorted(order[:count])
    matrix = torch.zeros(count, len(scores))
    for token in order[: count - 1]:
        matrix[anchors.index(token), token] = 1
    ranks = range(1, len(merged) + 1)
    for rank, token in zip(ranks, merged, strict=True):
        matrix[anchors.index(merged[0]), token] = rank / sum(ranks)
    return matrix, anchors


def pool(stride):
    def decide(sequence, image, decoder, count):
        size = len(sequence.images[image])
        windows = [list(range(start, min(start + stride, size))) for start in range(0, size, stride)]
        matrix = torch.zeros(len(windows), size)
        for slot, window in enumerate(windows):
            matrix[slot, window] = 1 / len(window)
        return matrix, [window[(len(window) - 1) // 2] for window in windows]

    return decide


def raters(sequence, image) -> list[int]:
    visual, text = sequence.entry[sequence.entry_images[image]], sequence.entry[sequence.entry_words]
    share = (visual @ text.T).softmax(-1).mean(0)
    return [i for i, s in enumerate(share) if s > share.mean()] or list(range(len(share)))


def sparsevlm(sequence, image, decoder, count):
    scores = word_rows(sequence, image).mean(0)[raters(sequence, image)].mean(0)
    kept = best(scores, count)
    pruned = [i for i in best(scores, len(scores)) if i not in kept]
    sources = pruned[: int(0.3 * len(pruned)) + 1]
    rows = sequence.rows[[sequence.images[image][i] for i in sources]]
    clusters = len(sources) // 10 + 1
    apart = torch.tensor([[float((a - b).norm()) for b in rows] for a in rows]) / rows.shape[1] ** 0.5
    density = [float((-(d.sort().values[:clusters] ** 2).mean()).exp()) for d in apart]
    value = []
    for i in range(len(sources)):
        denser = [float(apart[i, j]) for j in range(len(sources)) if (density[j], -j) > (density[i], -i)]
        value.append(density[i] * min(denser, default=float(apart.max())))
    centres = best(torch.tensor(value), clusters)
    members: dict[int, list[int]] = {c: [] for c in centres}
    for i in range(len(sources)):
        members[i if i in centres else min(centres, key=lambda c: float(apart[i, c]))].append(i)
    anchors = sorted([*kept, *(sources[c] for c in centres)])
    matrix = torch.zeros(len(anchors), len(scores))
    for token in kept:
        matrix[anchors.index(token), token] = 1
    for centre, of in members.items():
        matrix[anchors.index(sources[centre]), [sources[i] for i in of]] = 1 / len(of)
    return matrix, anchors


def sparsevlm_plus(sequence, image, decoder, count):
    cos, sin = rotary(decoder, sequence)
    half = cos.shape[-1] // 2
    ones = cos + torch.cat([-sin[:, :half], sin[:, half:]], -1)
    gravity = ones[sequence.words] @ ones[sequence.images[image]].T / cos.shape[-1] ** 0.5
    rows = (word_rows(sequence, image) / gravity)[:, raters(sequence, image)]
    heads = best(rows.sum((1, 2)), len(rows) // 2)
    scores = rows[heads].mean((0, 1))
    return pick(best(scores, count), len(scores))


def sparsevlm_rank(scale, bias):
    def decide(sequence, image, decoder, count):
        rows = word_rows(sequence, image).mean(0)[raters(sequence, image)]
        rank, size = int(torch.linalg.matrix_rank(rows)), rows.shape[1]
        wanted = size if rank == size else max(1, min(int(rank * scale + bias), size - 1))
        return pick(best(rows.mean(0), wanted), size)

    return decide


def mustdrop(together, single):
    def decide(sequence, image, decoder, count):
        attention = word_rows(sequence, image).mean(0)
        sums, entered = attention.sum(0), len(sequence.entry_images[image])
        total = float(sums.sum())
        kept = [
            i
            for i in range(len(sums))
            if float(sums[i]) >= together / entered * total or float(attention[:, i].max()) >= single / entered
        ]
        return pick(kept or best(sums, 1), len(sums))

    return decide


def dart(visual_pivots, text_pivots):
    def decide(sequence, image, decoder, count):
        here, keys = sequence.images[image], sequence.seen[-1].keys.abs().sum(-1)
        rows = torch.nn.functional.normalize(decoder.norm(sequence.rows), dim=-1)
        visual, text = best(keys[here], visual_pivots), best(keys[sequence.words], text_pivots)
        text = [text[i % len(text)] for i in range(text_pivots)]
        pivots = [here[i] for i in visual] + [sequence.words[i] for i in text]
        taken, extra = list(visual), count - len(visual)
        for turn, pivot in enumerate(pivots):
            share = extra * (turn + 1) // len(pivots) - extra * turn // len(pivots)
            unlike = -(rows[here] @ rows[pivot])
            unlike[taken] = -torch.inf
            taken += best(unlike, share)
        return pick(taken, len(here))

    return decide


def topv(sequence, image, decoder, count):
    here, block, (_, width) = sequence.images[image], sequence.seen[-1], sequence.places[image]
    places = torch.tensor([[i // width, i % width] for i in sequence.left[image]]).float()
    centre = (places.amax(0) + places.amin(0)) / 2

    def scaled(term: Tensor) -> Tensor:
        return (term - term.min()) / (term.max() - term.min())

    alike = (block.entered[here][:, None] - block.middle[here][None]).square().sum(-1)
    near = 1 - (-(places[:, None] - places[None]).square().sum(-1) / 200).exp()
    cost = scaled(alike) + scaled(near) + 0.01 * scaled((places - centre).norm(dim=-1))[:, None]
    plan = (-cost / 0.1).exp()
    for _ in range(3):
        plan = plan / plan.sum(1, keepdim=True) / len(here)
        plan = plan / plan.sum(0, keepdim=True) / len(here)
    again = int(0.1 * count)
    kept = best(plan.sum(1), count - again)
    others = [i for i in range(len(here)) if i not in kept]
    kept += [others[(2 * i + 1) * len(others) // (2 * again)] for i in range(again)]
    return pick(kept, len(here))
