"""Methods inside the vision encoder, restated from their papers in plain steps, and the specs they are checked with.

The tiny vision encoders have 25 patches and 4 layers, the third of which gives the features. The numbers that leave in
each layer are written out. A method without a rule here goes through the laws all the same.
"""

import math

from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.support.encoder_oracle import Group, Rows, Rule


def tome(leave: list[int], official: bool = False):
    """ToMe: ``leave[stage]`` of the tokens at even places of the whole sequence merge."""

    def groups(stage: int, rows: Rows, x: Tensor) -> list[Group]:
        keys, n, special = rows.keys[-1].mean(0)[rows.specials :], len(rows.places), rows.specials
        seeking = [i for i in range(n) if (i + special) % 2 == 0]
        others = [i for i in range(n) if (i + special) % 2 == 1]
        best = {i: max((cosine_similarity(keys[i], keys[j], dim=0).item(), -j) for j in others) for i in seeking}
        ranked = sorted(seeking, key=lambda i: (-best[i][0], i))
        gone = {i: -best[i][1] for i in ranked[: leave[stage]]}
        stay = [i for i in range(n) if i not in gone]
        if official:
            alone = ranked[leave[stage] :]
            stay = (sorted(alone) if special else alone) + others
        out = []
        for i in stay:
            members = [i, *(j for j, into in gone.items() if into == i)]
            total = sum(rows.sizes[j] for j in members)
            out.append((i, [(j, rows.sizes[j] / total) for j in members]))
        return out

    return groups


def illava(leave: list[int], favour: bool = False):
    """iLLaVA: the tokens that receive least attention become one, weights by rank."""

    def groups(stage: int, rows: Rows, x: Tensor) -> list[Group]:
        received = rows.attention[-1].mean((0, 1))[rows.specials :].tolist()
        lowest = sorted(range(len(received)), key=received.__getitem__)[: leave[stage] + 1]
        best = lowest[-1]
        weights = range(1, len(lowest) + 1) if favour else range(len(lowest), 0, -1)
        merged = [(token, w / sum(range(1, len(lowest) + 1))) for token, w in zip(lowest, weights, strict=True)]
        stay = [i for i in range(len(received)) if i not in lowest or i == best]
        return [(i, merged if i == best else [(i, 1.0)]) for i in stay]

    return groups


def mustdrop(side: int, window: int, threshold: float):
    """MustDrop: windows whose patches are alike become their mean, in the middle."""

    def groups(stage: int, rows: Rows, x: Tensor) -> list[Group]:
        patches, merged = x[rows.specials :], {}
        for top in range(0, side - window + 1, window):
            for left in range(0, side - window + 1, window):
                members = [(top + i) * side + left + j for i in range(window) for j in range(window)]
                pairs = [
                    cosine_similarity(patches[a], patches[b], dim=0).item() for a in members for b in members if a != b
                ]
                if sum(pairs) / len(pairs) >= threshold:
                    merged[(top + window // 2) * side + left + window // 2] = members
        inside = {i for members in merged.values() for i in members}
        stay = [i for i in range(len(patches)) if i not in inside or i in merged]
        return [(i, [(j, 1 / len(merged[i])) for j in merged[i]] if i in merged else [(i, 1.0)]) for i in stay]

    return groups


def flowcut(keep: int, every: int):
    """FlowCut: scores of all layers so far, halved in each; the entropy of the last attention says how many leave."""

    def groups(stage: int, rows: Rows, x: Tensor) -> list[Group]:
        if len(rows.places) <= keep:
            return [(i, [(i, 1.0)]) for i in range(len(rows.places))]
        special, scores = rows.specials, None
        for layer in range(stage + 1):
            mine = rows.values[layer]
            kinds = [rows.attention[layer], (mine @ mine.transpose(1, 2)).softmax(-1)]
            # the row of [CLS], or the mean over all rows
            looks = [(kind[:, 0] if special else kind.mean(1)).mean(0)[special:] for kind in kinds]
            shares = [look / look.sum() for look in looks]
            score = (shares[0] + shares[1]) * mine.mean(0)[special:].abs().sum(-1)
            scores = score if scores is None else (scores + score) / 2
            scores = scores if layer == stage else rows.matrices[layer] @ scores
        n, to_come = len(rows.places), 1 - stage
        entropy = -sum(p * math.log(p) for p in shares[0].tolist())
        leave = (n - keep) / math.sqrt(to_come) * (1 - (entropy / math.log(n)) ** 2) if to_come else n - keep
        stay = n if to_come % every else max(keep, n - round(leave))
        best = sorted(sorted(range(n), key=lambda i: -float(scores[i]))[:stay])
        return [(i, [(i, 1.0)]) for i in best]

    return groups


EVERY = [0, 1, 2]
RULES = {
    "tome(keep=5)": Rule(tome([7, 8, 5]), EVERY, proportional=True),  # no layer can merge more than half
    "tome(keep=0.5)": Rule(tome([4, 5, 4]), EVERY, proportional=True),
    "tome(keep=0.5, official_order=True)": Rule(tome([4, 5, 4], official=True), EVERY, proportional=True),
    "tome(r=4, prop_attn=False)": Rule(tome([4, 4, 4]), EVERY),
    "tome(keep=13, inflection=1.0)": Rule(tome([0, 4, 8]), EVERY, proportional=True),
    "illava-encoder(keep=0.4)": Rule(illava([8, 7]), [1, 2]),
    "illava-encoder(keep=6, layers=(0, 2), favour_attended=True)": Rule(illava([10, 9], favour=True), [0, 2]),
    "flowcut(keep=9)": Rule(flowcut(9, 2), [0, 1], behind=True),
    "flowcut(keep=6, every=1)": Rule(flowcut(6, 1), [0, 1], behind=True),
    "mustdrop-encoder(threshold=-1.0)": Rule(mustdrop(5, 3, -1.0), [0], behind=True),
    "mustdrop-encoder(threshold=0.45, window=2, layer=1)": Rule(mustdrop(5, 2, 0.45), [1], behind=True),
    "mustdrop-encoder(threshold=0.0125, window=2, layer=1)": Rule(mustdrop(5, 2, 0.0125), [1], behind=True),
}
FAMILIES = ("llava-clip", "llava-siglip")
# these keep different numbers of different images
ADAPTIVE = {
    "llava-clip": "mustdrop-encoder(threshold=0.45, window=2, layer=1)",
    "llava-siglip": "mustdrop-encoder(threshold=0.0125, window=2, layer=1)",
}
