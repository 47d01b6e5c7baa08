"""Reduction inside a CLIP or SigLIP tower by hand: one image, layer by layer, attention written out, no hooks.

A rule looks at one layer and returns groups: for each token that stays, its number and a list of (member, weight).
Everything is python lists and dense matrices; nothing of the engine or of the methods is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.support.laws_reference import Encoded

Group = tuple[int, list[tuple[int, float]]]


@dataclass
class Rows:
    """One image in the tower.

    Attributes:
        x: `[specials + n, C]`.
        places: original index of each token.
        mixed: `[n, N]`, what each token is made of.
        sizes: patches that each token stands for.
        attention: per layer, `[H, L, L]`; keys: `[H, L, d]`; matrices: `[m, n]`, what each stage did.
        states: rows, places before the first layer and behind each.
    """

    x: Tensor
    specials: int
    places: list[int]
    mixed: Tensor
    sizes: list[int]
    attention: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    matrices: dict[int, Tensor] = field(default_factory=dict)
    states: list[tuple[Tensor, list[int]]] = field(default_factory=list)

    def merge(self, layer: int, groups: list[Group], x: Tensor) -> Tensor:
        """The rows ``x`` after the groups of one stage were made."""
        matrix = torch.zeros(len(groups), len(self.places))
        for slot, (_, members) in enumerate(groups):
            for token, weight in members:
                matrix[slot, token] = weight
        self.matrices[layer] = matrix
        self.mixed = matrix @ self.mixed
        self.places = [self.places[token] for token, _ in groups]
        self.sizes = [sum(self.sizes[t] for t, _ in members) for _, members in groups]
        return torch.cat([x[: self.specials], matrix @ x[self.specials :]])


@dataclass
class Rule:
    """``layers``: where; ``behind``: after the whole layer; ``proportional``: log sizes are added to attention."""

    groups: object
    layers: list[int]
    behind: bool = False
    proportional: bool = False


def run(tower, pixels: Tensor, rule: Rule) -> Rows:
    """All layers; differentiable."""
    x = tower.embeddings(pixels[None])
    x = (tower.pre_layrnorm(x) if hasattr(tower, "pre_layrnorm") else x)[0]
    specials = int(hasattr(tower.embeddings, "class_embedding"))
    n = len(x) - specials
    rows = Rows(x, specials, list(range(n)), torch.eye(n), [1] * n)
    rows.states.append((x, rows.places))
    for number, layer in enumerate(tower.encoder.layers):
        x, module = rows.x, layer.self_attn

        def heads(projection, x=x, layer=layer, module=module):
            return projection(layer.layer_norm1(x)).view(len(x), module.num_heads, -1).transpose(0, 1)

        q, k, v = heads(module.q_proj), heads(module.k_proj), heads(module.v_proj)
        scores = q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5
        if rule.proportional:
            scores = scores + torch.tensor([1.0] * specials + [float(s) for s in rows.sizes]).log()
        weights = scores.softmax(-1)
        rows.attention.append(weights)
        rows.keys.append(k)
        x = x + module.out_proj((weights @ v).transpose(0, 1).flatten(1))
        stage = rule.layers.index(number) if number in rule.layers else None
        if stage is not None and not rule.behind:
            x = rows.merge(number, rule.groups(stage, rows, x), x)
        x = x + layer.mlp(layer.layer_norm2(x))
        if stage is not None and rule.behind:
            x = rows.merge(number, rule.groups(stage, rows, x), x)
        rows.x = x
        rows.states.append((x, rows.places))
    return rows


def features(model, rows: Rows, state: int) -> tuple[Tensor, list[int], Tensor]:
    """What enters the LLM: projected rows in raster order, their places, and what they are made of `[K, N]`."""
    x, places = rows.states[state]
    order = sorted(range(len(places)), key=places.__getitem__)
    mixed = rows.mixed if len(rows.mixed) == len(places) else None
    assert mixed is not None, "tokens left behind the layer that the features come from"
    return model.model.multi_modal_projector(x[rows.specials :][order]), [places[i] for i in order], mixed[order]


def encoded(model, rows: Rows, state: int) -> tuple[Encoded, list[int], Tensor]:
    found, places, mixed = features(model, rows, state)
    return Encoded(found, []), places, mixed


# -- rules ----------------------------------------------------------------------------------------------------------


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
