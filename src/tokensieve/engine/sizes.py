"""The number of original tokens that each visual token stands for, and the biases of attention that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from tokensieve.reduction import Mixing, Reduction


def carried_sizes(
    sizes: Tensor, decision: Reduction, rows: Tensor | None = None, separator: Tensor | None = None
) -> Tensor:
    """Return the sizes after a decision, `[K]` float32: each token counts once, wherever it went.

    A merged token is shared out over its slots in proportion to its weights. A dropped token counts for the kept token
    whose row has the largest cosine to its own; the content of that token does not change.

    Args:
        sizes: `[N]`, before the decision.
        decision: about one image.
        rows: `[N, D]`, the rows that the decision was made on; ``None``: dropped tokens are not counted.
        separator: `[N]` bool, True on tokens that show no patch: they have size 1, and no token counts for them.
    """
    if decision.whole or not decision.slots:
        return sizes[: decision.slots]
    if decision.soft:  # in training; the log of the share is finite
        return sizes * decision.entries().weight.clamp(min=torch.finfo(torch.float32).eps)
    entries, anchors = decision.entries(), decision.anchors
    weight = entries.weight.abs()
    total = torch.zeros_like(sizes).scatter_add(0, entries.source, weight)
    share = weight / total.clamp(min=torch.finfo(torch.float32).tiny)[entries.source]
    carried = sizes.new_zeros(decision.slots).scatter_add(0, entries.slot, sizes[entries.source] * share)
    if rows is None:
        return carried
    dropped = total == 0
    unit = normalize(rows.detach().float(), dim=-1)
    similarity = unit @ unit[anchors].T
    if separator is not None:
        dropped = dropped & ~separator
        similarity = similarity.masked_fill(separator[anchors], -torch.inf)
    # every token gets a slot, so that the number of dropped ones need not be known on the host
    return carried.scatter_add(0, similarity.argmax(-1), sizes * dropped)


def uniform_sizes(sizes: Tensor, separator: Tensor | None) -> Tensor:
    """Return `[K]` the mean size of an image's patches at each of them; separators keep theirs."""
    if separator is None:
        return sizes.mean().expand_as(sizes)
    patch = (~separator).float()
    mean = (sizes * patch).sum() / patch.sum().clamp(min=1)
    return sizes.where(separator, mean)


def key_bias(visual: Tensor, sizes: Sequence[Tensor]) -> Tensor:
    """Return `[B, n]` float32, the log of the size of each column; 0 on text and padding.

    Args:
        visual: `[B, n]` bool, True on visual tokens.
        sizes: `[K]` of all images of the batch, in order.
    """
    # masked_scatter fills row by row, in the order of the images
    return torch.zeros(visual.shape, device=visual.device).masked_scatter(visual, torch.cat(list(sizes)).log())


def joined_bias(first: Tensor | None, columns: int, second: Tensor | None, following: int) -> Tensor | None:
    """Return the bias of ``columns`` columns and then of ``following`` ones; without a bias they have zeros."""
    if first is None or second is None:
        return (
            pad(first, (0, following)) if first is not None else None if second is None else pad(second, (columns, 0))
        )
    layers = max(len(first), len(second))
    return torch.cat([first.expand(layers, -1, -1), second.expand(layers, -1, -1)], -1)


def median_order(decision: Reduction) -> tuple[Tensor, Tensor]:
    """Return the median member of each slot's group, `[K]` ascending, and the slot that each of them is of, `[K]`.

    A group has the tokens that weigh most in its slot. The median of an even number is the earlier of the two. If some
    slot has no such token, the anchors stay.
    """
    slot_of, slots = decision.source, decision.slots
    in_slots = (slot_of >= 0).long()
    counts = slot_of.new_zeros(slots).scatter_add(0, slot_of.clamp(min=0), in_slots)
    by_slot = slot_of.argsort(stable=True)  # dropped tokens come first, then the members of each slot in order
    start = counts.cumsum(0) - counts + (len(slot_of) - in_slots.sum())
    medians = by_slot[(start + (counts - 1) // 2).clamp(max=len(by_slot) - 1)]
    medians = torch.where((counts == 0).any(), decision.anchors, medians)
    return medians.sort()


def reordered(decision: Reduction, order: Tensor, anchors: Tensor | None = None) -> Reduction:
    """Return the decision with its slots in another order, at other anchors if given."""
    mixing = decision.mixing
    if mixing is not None:  # argsort of a permutation is its inverse
        mixing = Mixing(order.argsort()[mixing.slot], mixing.source, mixing.weight)
    return replace(decision, anchors=decision.anchors[order] if anchors is None else anchors, mixing=mixing)


def at_medians(decision: Reduction) -> Reduction:
    """Move each merged token to the median place of its group; a decision without merging stays as it is."""
    if decision.mixing is None or not decision.slots:
        return decision
    medians, order = median_order(decision)
    return reordered(decision, order, medians)
