"""The hand reference inside a CLIP or SigLIP vision encoder: one image, layer by layer, attention by hand.

A rule receives one layer and returns groups: for each token that stays, its number and a list of (member, weight).
There are Python lists and dense matrices only; nothing of the engine or of the methods is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.support.oracle import Encoded

Group = tuple[int, list[tuple[int, float]]]


@dataclass
class Rows:
    """One image in the tower.

    Attributes:
        x: `[specials + n, C]`.
        places: original index of each token.
        mixed: `[n, N]`, what each token is made of.
        sizes: patches that each token stands for.
        attention: per layer, `[H, L, L]`; keys, values: `[H, L, d]`; matrices: `[m, n]`, what each stage did.
        states: rows, places before the first layer and behind each.
    """

    x: Tensor
    specials: int
    places: list[int]
    mixed: Tensor
    sizes: list[int]
    attention: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
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
    x = tower.embeddings(pixels)
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
        rows.values.append(v)
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
    """Return what enters the LLM: projected rows in raster order, their places, and W `[K, N]`."""
    x, places = rows.states[state]
    order = sorted(range(len(places)), key=places.__getitem__)
    mixed = rows.mixed if len(rows.mixed) == len(places) else None
    assert mixed is not None, "tokens left behind the layer that the features come from"
    return model.model.multi_modal_projector(x[rows.specials :][order]), [places[i] for i in order], mixed[order]


def encoded(model, rows: Rows, state: int) -> tuple[Encoded, list[int], Tensor]:
    found, places, mixed = features(model, rows, state)
    return Encoded(found, []), places, mixed
