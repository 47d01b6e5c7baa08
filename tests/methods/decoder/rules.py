"""Methods inside the LLM, restated from their papers in plain steps, and the specs they are checked with.

A rule receives an :class:`oracle.Sequence` and one of its images. LLMs have six layers. A method without a rule here
goes through the laws all the same: there its own decisions are replayed by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.support.oracle import Decision, Layer, Sequence


@dataclass(frozen=True)
class Rule:
    """One spec by hand.

    Attributes:
        layers: before which tokens leave.
        decide: ``decide(sequence, image, layer, count)`` returns the decision for one image.
        counts: tokens after each of the layers, of an image of which N0 tokens entered; ``None``: no budget.
    """

    layers: list[int]
    decide: Callable
    counts: Callable[[int], list[int]] | None = None

    def __call__(self, layer: Layer, sequence: Sequence) -> list[Decision] | None:
        if layer.number not in self.layers:
            return None
        stage = self.layers.index(layer.number)
        return [self.image(stage, layer, sequence, image) for image in range(len(sequence.kept))]

    def image(self, stage: int, layer: Layer, sequence: Sequence, image: int) -> Decision:
        size, count = len(sequence.images[image]), None
        if self.counts is not None:
            count = self.counts(len(sequence.entry.images[image]))[stage]
            if count >= size:
                return torch.eye(size), list(range(size))
        return self.decide(sequence, image, layer, count)


def pick(indices, size: int) -> Decision:
    anchors = sorted(int(i) for i in indices)
    return torch.eye(size)[anchors], anchors


def best(scores: Tensor, count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:count]


def last_row(sequence: Sequence, image: int) -> Tensor:
    """Attention of the last prompt token in the block that ran last, mean over heads."""
    return sequence.layers[-1].attention[:, sequence.prompt - 1, sequence.images[image]].mean(0)


def word_rows(sequence: Sequence, image: int) -> Tensor:
    """`[H, M, N]`."""
    return sequence.layers[-1].attention[:, sequence.words][:, :, sequence.images[image]]


def after_images(sequence: Sequence) -> range:
    """Rows of the prompt behind its last image."""
    return range(max(max(image) for image in sequence.images) + 1, sequence.prompt)


def priortr(query):
    def decide(sequence, image, layer, count):
        tokens, attention = sequence.images[image], sequence.layers[-1].attention.mean(0)
        rows = after_images(sequence) if query == "all" else [sequence.prompt - 1]
        task = attention[list(rows)][:, tokens].mean(0)
        prior = attention[tokens[-1] + 1, tokens]
        task, prior = task / task.sum(), prior / prior.sum()
        return pick(best(task * (task / prior).log(), count), len(tokens))

    return decide


def waves(size: int) -> Tensor:
    """Return the discrete Fourier transform of ``size`` numbers as a matrix."""
    steps = torch.arange(size, dtype=torch.float64)
    return torch.exp(-2j * torch.pi * steps[:, None] * steps / size)


def details(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the size of what a filter of high frequencies leaves of each row, mean over channels."""
    down, across = waves(grid[0]), waves(grid[1])
    spectrum = torch.einsum("ay,yxc,bx->abc", down, rows.view(*grid, -1).to(down.dtype), across)
    sigma = 0.1 * min(grid[0] // 2, grid[1] // 2)
    for a in range(grid[0]):
        for b in range(grid[1]):
            distance = min(a, grid[0] - a) ** 2 + min(b, grid[1] - b) ** 2
            spectrum[a, b] *= 1 - math.exp(-distance / (2 * sigma**2))
    back = torch.einsum("ya,abc,xb->yxc", down.conj(), spectrum, across.conj()) / (grid[0] * grid[1])
    return back.abs().mean(-1).flatten()


def clse(sequence, image, layer, count):
    tokens, scores, grid = sequence.images[image], last_row(sequence, image), sequence.grids[image]
    if grid is not None and len(tokens) == grid[0] * grid[1]:
        first, now = (details(rows[tokens], grid) for rows in (sequence.entry.rows, sequence.rows))
        change = ((now - first).abs() / (first + first.mean())).clamp(max=1)
        scores = scores * ((change - change.mean()) / change.std() / 0.1).sigmoid().float()
    return pick(best(scores, count), len(tokens))


def gradient_norms(sequence: Sequence, layer: Layer, places: list[int]) -> Tensor:
    """Return the norm `[prompt]` of the gradient of the layer's guesses at some places of the prompt to its input."""
    with torch.enable_grad():
        rows = sequence.rows[: sequence.prompt].detach().clone().requires_grad_()
        alone = replace(layer, rows=rows, position_ids=layer.position_ids[..., : sequence.prompt])
        module = layer.decoder.layers[layer.number]
        states = rows + alone.attended[0]
        states = states + module.mlp(module.post_attention_layernorm(states))
        for place in places:
            words = layer.head(layer.decoder.norm(states[place])).log_softmax(-1)
            (-words.max()).backward(retain_graph=True)
    return rows.grad.norm(dim=-1)


def trio(places):
    def decide(sequence, image, layer, count):
        tokens = sequence.images[image]
        scores = gradient_norms(sequence, layer, places)[tokens]
        rows = torch.nn.functional.normalize(sequence.rows[tokens], dim=-1)
        chosen, waiting = [], []
        for token in best(scores, len(tokens)):
            (waiting if any(rows[token] @ rows[i] >= 0.8 for i in chosen) else chosen).append(token)
        return pick((chosen + waiting)[:count], len(tokens))

    return decide


def fastv(sequence, image, layer, count):
    scores = last_row(sequence, image)
    return pick(best(scores, count), len(scores))


def window_fastv(windows):
    def decide(sequence, image, layer, count):
        scores, chosen, groups = last_row(sequence, image), [], min(windows, count)
        for g in range(groups):
            start, end = len(scores) * g // groups, len(scores) * (g + 1) // groups
            quota = count * (g + 1) // groups - count * g // groups
            chosen += [start + i for i in best(scores[start:end], quota)]
        return pick(chosen, len(scores))

    return decide


def pyramiddrop(sequence, image, layer, count):
    scores = layer.attention[:, sequence.prompt - 1, sequence.images[image]].mean(0)
    return pick(best(scores, count), len(scores))


def twig(blocks):
    """Blocks with the weights of the LLM's next layers run on a copy of the rows; deepstack adds nothing to them."""

    def decide(sequence, image, layer, count):
        size, rows = len(sequence.images[image]), layer.rows
        for number in range(layer.number, layer.number + blocks - 1) if count else ():
            module = layer.decoder.layers[number]
            rows = rows + replace(layer, number=number, rows=rows).attended[0]
            rows = rows + module.mlp(module.post_attention_layernorm(rows))
        if not count:
            return pick([], size)
        last = replace(layer, number=layer.number + blocks - 1, rows=rows)
        return pick(best(last.attention[:, sequence.prompt - 1, sequence.images[image]].mean(0), count), size)

    return decide


def vtw(sequence, image, layer, count):
    return pick([], len(sequence.images[image]))


def text_correlation(sequence, image, layer, count):
    scores = word_rows(sequence, image).mean((0, 1))
    return pick(best(scores, count), len(scores))


def illava(sequence, image, layer, count):
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
    def decide(sequence, image, layer, count):
        size = len(sequence.images[image])
        windows = [list(range(start, min(start + stride, size))) for start in range(0, size, stride)]
        matrix = torch.zeros(len(windows), size)
        for slot, window in enumerate(windows):
            matrix[slot, window] = 1 / len(window)
        return matrix, [window[(len(window) - 1) // 2] for window in windows]

    return decide


def raters(sequence, image) -> list[int]:
    visual, text = sequence.entry.rows[sequence.entry.images[image]], sequence.entry.rows[sequence.entry.words]
    share = (visual @ text.T).softmax(-1).mean(0)
    return [i for i, s in enumerate(share) if s > share.mean()] or list(range(len(share)))


def sparsevlm(sequence, image, layer, count):
    scores = word_rows(sequence, image).mean(0)[raters(sequence, image)].mean(0)
    return recycled(sequence, image, scores, count)


def recycled(sequence, image, scores, count):
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


def autoprune(keep, k0=0.4, gamma=0.2, centre=14.9):
    """Tokens leave before layers 2 to 5 of 6; the numbers follow the attention of layer 1, in which all tokens are."""

    def schedule(sequence, image):
        tokens = sequence.entry.images[image]
        text = range(max(max(columns) for columns in sequence.entry.images) + 1, sequence.entry.prompt)
        attention = sequence.layers[1].attention[:, list(text)][:, :, tokens]
        bits = 0.0
        for head in attention:
            joint = head / len(text)
            bits += float((joint * (joint / (joint.sum(0) / len(text) + 1e-6)).clamp(min=1e-6).log2()).sum())
        slope, total = max(0.0, k0 - gamma * bits * 32 / len(attention)), len(tokens)
        shares = [0.75 / (1 + math.exp(slope * ((layer - 1) * 32 / 6 - centre - slope))) for layer in (2, 3, 4, 5)]

        def numbers(scale):
            counts, through, left = [], 2 * total, total
            for part in shares:
                counts.append(max(1, min(math.ceil((total - 1) * scale * part), left)))
                if counts[-1] < left:
                    left = counts[-1] + (int(0.3 * (left - counts[-1])) + 1) // 10 + 1
                through += left
            return through - 6 * keep * total, counts

        low, high, tried = 0.0, 20.0, []
        for _ in range(60):
            middle = (low + high) / 2
            tried.append(numbers(middle))
            low, high = (middle, high) if tried[-1][0] < 0 else (low, middle)
        return min(tried, key=lambda pair: abs(pair[0]))[1]

    def decide(sequence, image, layer, count):
        tokens = sequence.images[image]
        wanted = schedule(sequence, image)[layer.number - 2]
        if wanted >= len(tokens):
            return torch.eye(len(tokens)), list(range(len(tokens)))
        rows = sequence.layers[-1].attention[:, list(after_images(sequence))][:, :, tokens]
        return recycled(sequence, image, rows.mean((0, 1)), wanted)

    return decide


def sparsevlm_plus(sequence, image, layer, count):
    cos, sin = layer.rotary
    half = cos.shape[-1] // 2
    ones = cos + torch.cat([-sin[:, :half], sin[:, half:]], -1)
    gravity = ones[sequence.words] @ ones[sequence.images[image]].T / cos.shape[-1] ** 0.5
    rows = (word_rows(sequence, image) / gravity)[:, raters(sequence, image)]
    heads = best(rows.sum((1, 2)), len(rows) // 2)
    scores = rows[heads].mean((0, 1))
    return pick(best(scores, count), len(scores))


def sparsevlm_rank(scale, bias):
    def decide(sequence, image, layer, count):
        rows = word_rows(sequence, image).mean(0)[raters(sequence, image)]
        rank, size = int(torch.linalg.matrix_rank(rows)), rows.shape[1]
        wanted = size if rank == size else max(1, min(int(rank * scale + bias), size - 1))
        return pick(best(rows.mean(0), wanted), size)

    return decide


def mustdrop(together, single):
    def decide(sequence, image, layer, count):
        attention = word_rows(sequence, image).mean(0)
        sums, entered = attention.sum(0), len(sequence.entry.images[image])
        total = float(sums.sum())
        kept = [
            i
            for i in range(len(sums))
            if float(sums[i]) >= together / entered * total or float(attention[:, i].max()) >= single / entered
        ]
        return pick(kept or best(sums, 1), len(sums))

    return decide


def dart(visual_pivots, text_pivots):
    def decide(sequence, image, layer, count):
        tokens, keys = sequence.images[image], sequence.layers[-1].keys.abs().sum(-1)
        rows = torch.nn.functional.normalize(layer.decoder.norm(sequence.rows), dim=-1)
        visual, text = best(keys[tokens], visual_pivots), best(keys[sequence.words], text_pivots)
        text = [text[i % len(text)] for i in range(text_pivots)]
        pivots = [tokens[i] for i in visual] + [sequence.words[i] for i in text]
        taken, extra = list(visual), count - len(visual)
        for turn, pivot in enumerate(pivots):
            share = extra * (turn + 1) // len(pivots) - extra * turn // len(pivots)
            unlike = -(rows[tokens] @ rows[pivot])
            unlike[taken] = -torch.inf
            taken += best(unlike, share)
        return pick(taken, len(tokens))

    return decide


def topv(sequence, image, layer, count):
    tokens, last, width = sequence.images[image], sequence.layers[-1], sequence.grids[image][1]
    places = torch.tensor([[i // width, i % width] for i in sequence.kept[image]]).float()
    centre = (places.amax(0) + places.amin(0)) / 2

    def scaled(term: Tensor) -> Tensor:
        return (term - term.min()) / (term.max() - term.min())

    difference = (last.rows[tokens][:, None] - last.mlp_input[tokens][None]).square().sum(-1)
    near = 1 - (-(places[:, None] - places[None]).square().sum(-1) / 200).exp()
    cost = scaled(difference) + scaled(near) + 0.01 * scaled((places - centre).norm(dim=-1))[:, None]
    plan = (-cost / 0.1).exp()
    for _ in range(3):
        plan = plan / plan.sum(1, keepdim=True) / len(tokens)
        plan = plan / plan.sum(0, keepdim=True) / len(tokens)
    again = int(0.1 * count)
    kept = best(plan.sum(1), count - again)
    others = [i for i in range(len(tokens)) if i not in kept]
    kept += [others[(2 * i + 1) * len(others) // (2 * again)] for i in range(again)]
    return pick(kept, len(tokens))


# -- specs ----------------------------------------------------------------------------------------------------------


def share(keep):
    return lambda entered: [max(1, round(keep * entered))]


def down(*shares):
    return lambda entered: [max(1, int(s * entered)) for s in shares]


def geometric(keep, stages):
    """Shares that fall geometrically, rounded down; the last is the budget itself."""

    def counts(entered):
        last = max(1, round(keep * entered))
        return [max(last, int(entered * keep ** (s / stages) + 1e-9)) for s in range(1, stages)] + [last]

    return counts


def fixed(keep):
    return lambda entered: [keep]


RULES = {
    "fastv(layer=2, keep=0.4)": Rule([2], fastv, share(0.4)),
    "fastv(layer=1, keep=13)": Rule([1], fastv, fixed(13)),  # some images stay whole
    # the mean over 6 blocks is half: 2 full blocks, then a quarter
    "fastv(layer=2, average=0.5)": Rule([2], fastv, share(0.25)),
    "window-fastv(layer=2, keep=0.4, windows=3)": Rule([2], window_fastv(3), share(0.4)),
    "pyramiddrop(keep=0.2)": Rule([2, 3, 4], pyramiddrop, geometric(0.2, 3)),
    "pyramiddrop(layers=(1, 4), counts=(0.5, 0.2))": Rule([1, 4], pyramiddrop, down(0.5, 0.2)),
    "vtw(layer=3)": Rule([3], vtw),
    "twigvlm(layers=(1, 4), blocks=3, keep=0.4, weights='random')": Rule(
        [1, 4], twig(3), lambda n: [*share(0.4)(n), 0]
    ),
    "sparsevlm(layers=(2, 3), counts=(0.5, 0.25))": Rule([2, 3], sparsevlm, down(0.5, 0.25)),
    "sparsevlm+(layers=(2, 4), counts=(0.5, 0.25))": Rule([2, 4], sparsevlm_plus, down(0.5, 0.25)),
    "sparsevlm-rank(layers=(1, 3), scale=2.0, bias=1.0)": Rule([1, 3], sparsevlm_rank(2.0, 1.0)),
    "mustdrop-llm(layers=(1, 3), together=0.8, single=2.0)": Rule([1, 3], mustdrop(0.8, 2.0)),
    "dart(layer=2, keep=0.5, visual_pivots=2, text_pivots=3)": Rule([2], dart(2, 3), share(0.5)),
    "topv(layer=2, keep=0.7)": Rule([2], topv, share(0.7)),
    "text-correlation(layer=2, keep=0.4)": Rule([2], text_correlation, share(0.4)),
    "illava-llm(layer=2, keep=0.4)": Rule([2], illava, share(0.4)),
    "pool-decoder(layer=1, stride=3)": Rule([1], pool(3)),
    "autoprune(keep=0.6, layer=2)": Rule([2, 3, 4, 5], autoprune(0.6)),
    "clse(layers=(1, 3), counts=(0.6, 0.3))": Rule([1, 3], clse, down(0.6, 0.3)),
    "trio(layers=(1, 3), counts=(0.6, 0.3))": Rule([1, 3], trio([-2, -3, -4, -5]), down(0.6, 0.3)),
    "trio(layers=(2,), keep=0.4, guesses=2, skip=0)": Rule([2], trio([-1, -2]), share(0.4)),
    "priortr(layer=3, keep=0.4)": Rule([3], priortr("all"), share(0.4)),
    "priortr(layer=1, keep=0.4, query='last')": Rule([1], priortr("last"), share(0.4)),
}
# a connector method, the rule inside, and the spec of both
COMPOSED = {
    "uniform(keep=9) + fastv(layer=2, keep=4)": Rule([2], fastv, fixed(4)),
    "pool(keep=9) + illava-llm(layer=3, keep=0.5)": Rule([3], illava, share(0.5)),
    "random(keep=0.7) + topv(layer=2, keep=0.6)": Rule([2], topv, share(0.6)),
    "divprune(keep=12) + sparsevlm(layers=(1, 4), counts=(6, 2))": Rule([1, 4], sparsevlm, lambda n: [6, 2]),
    "uniform(keep=10) + pyramiddrop(layers=(1, 3), counts=(6, 2))": Rule([1, 3], pyramiddrop, lambda n: [6, 2]),
}
WHOLE = (
    "fastv(keep=1.0)", "window-fastv(keep=1.0)", "pyramiddrop(keep=1.0)", "sparsevlm(keep=1.0)", "sparsevlm+(keep=1.0)",
    "dart(keep=1.0)", "topv(keep=1.0)", "text-correlation(keep=1.0)", "illava-llm(keep=1.0)", "fastv(average=10_000)",
    "pool-decoder(stride=1)", "priortr(keep=1.0)", "clse(keep=1.0)", "autoprune(keep=1.0)",
    "trio(keep=1.0)", "twigvlm(keep=1.0, weights='random')", "twigvlm(average=1.0, weights='random')",
)  # fmt: skip
