"""PruneSID: group the patches by principal components, and keep the most attended ones of each group that differ."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import ConnectorMethod, Needs, register
from tokensieve.ops import gram, normalise, rank_in_group, sizes_of, suppressed, top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given


@register("prunesid", paper="arXiv:2603.09480", needs=Needs(cls_attention=-2, patches=True))
@dataclass(frozen=True)
class PruneSID(ConnectorMethod):
    """Group the patches by their principal components, and keep of each group the most attended ones that differ.

    A patch belongs to the component that weighs most in it, of the first K/4 components of the sigmoid of the encoder's
    rows, centred over their channels. In falling order of the attention of [CLS], a patch is redundant if its cosine to
    an earlier patch of its group that is not exceeds 18 · K / N times the mean cosine of all pairs. Each group has one
    token; the other ones are shared out by the number of patches that are not redundant. Redundant patches come last.

    Args:
        keep: tokens per image, or a share of them (the paper: 192, 128 and 64 of 576).

    Cost: O(N²·(N + C)) time for the components of N rows of width C, and N steps of O(N); O(N²) extra memory.
    Paper: "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via Synergistic Importance-Diversity",
    2026. Its budget that follows the image is not here.
    Official code: for LLaVA, also passes on the encoder's [CLS] token as one of the K, and draws a random sketch to
    compute the components; here they are exact. For Qwen2-VL, the weight of the component ranks in the place of
    attention, and the mean counts each pair as 0 a second time.
    """

    keep: Budget = 64

    def reduce(self, image: ConnectorTokens) -> Reduction:
        rows, scores = given(image.patches), image.cls_attention[-2]
        groups = max(image.budget // 4, 1)
        group, cosine = _components(rows, groups), gram(normalise(rows))
        pairs = image.total * (image.total - 1) / 2
        mean = cosine.triu(1).sum((-1, -2), keepdim=True) / pairs
        near = (cosine > 18 * image.budget / image.total * mean) & (group[:, :, None] == group[:, None])
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        redundant = suppressed(near, order)
        # the place of each token if the redundant ones follow all others
        place = order.gather(-1, redundant.int().argsort(dim=-1, stable=True)).argsort(-1)
        differing = torch.zeros_like(place).scatter(-1, order, (~redundant).long())
        quota = _quotas(sizes_of(group, groups), _count(differing, group, groups), image.budget)
        stays = rank_in_group(-place.double(), group, groups) < quota.gather(-1, group)
        return image.keep(top_k(stays.int(), image.budget), scores)


def _components(rows: Tensor, number: int) -> Tensor:
    """Return the principal component that weighs most in each row `[B, N, C]`, of the first ``number``, `[B, N]`."""
    values = rows.float().sigmoid().double()
    values = values - values.mean(-1, keepdim=True)
    # the eigenvectors of all products of rows are the components' weights in the rows, ascending by eigenvalue
    vectors: Tensor = torch.linalg.eigh(values @ values.transpose(-1, -2)).eigenvectors
    return vectors[..., -number:].flip(-1).abs().argmax(-1)


def _count(marks: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sum ``marks`` `[B, N]` over each group, `[B, G]`."""
    return marks.new_zeros((len(marks), groups)).scatter_add(-1, group, marks)


def _quotas(sizes: Tensor, differing: Tensor, k: int) -> Tensor:
    """Share out k tokens over groups `[B, G]` of these sizes, of which so many differ: one each, and by these."""
    least, most = sizes.clamp(max=1), torch.minimum(sizes, differing).clamp(max=5 * -(-k // 64))
    while bool((short := most.sum(-1, keepdim=True) < k).any()):  # the bounds leave out too many: redundant ones stay
        most = torch.minimum(most + short.long(), sizes)
    shared_out = k - least.sum(-1, keepdim=True)
    ends = ((differing / differing.sum(-1, keepdim=True)).cumsum(-1) * shared_out).round().long()
    quota = torch.minimum(ends.diff(dim=-1, prepend=torch.zeros_like(shared_out)) + least, most)
    # what a bound cut off goes to the groups with the largest numbers of differing patches
    order = differing.sort(dim=-1, descending=True, stable=True).indices
    room = (most - quota).gather(-1, order)
    missing = k - quota.sum(-1, keepdim=True) - (room.cumsum(-1) - room)
    return quota.scatter_add(-1, order, missing.clamp(min=0).minimum(room))
