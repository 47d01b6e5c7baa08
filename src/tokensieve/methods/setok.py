"""SeTok: a trained transformer makes one token of each cluster of patches."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, one_hot, scaled_dot_product_attention

from tokensieve.methods import ModelShape, Needs, TrainedMethod, register
from tokensieve.methods.setok_cluster import clusters_of
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens


class Attention(nn.Module):
    """Self-attention of ``heads`` heads within the pairs that ``seen`` allows, `[B, n, C]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, rows: Tensor, seen: Tensor) -> Tensor:
        # each [B, heads, n, d]
        query, key, value = self.qkv(rows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, seen[:, None]).transpose(1, 2).flatten(2)
        projected: Tensor = self.proj(mixed)
        return projected


class Block(nn.Module):
    """Layers of attention that share one norm, and one MLP after them."""

    def __init__(self, width: int, heads: int, depth: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, rows: Tensor, seen: Tensor) -> Tensor:
        for layer in self.layers:
            rows = rows + self._dropped(layer(self.norm1(rows), seen))
        return rows + self._dropped(self.fc2(self._dropped(gelu(self.fc1(self.norm2(rows))))))

    def _dropped(self, rows: Tensor) -> Tensor:
        return dropout(rows, 0.2, self.training)


class Tokenizer(nn.Module):
    """Make one row `[D]` of each cluster: attention within it, the mean, then attention among the clusters."""

    def __init__(self, shape: ModelShape, heads: int = 2, depth: int = 2, hidden: int = 4096) -> None:
        super().__init__()
        width = shape.patch_width
        self.inner_encoder, self.inter_encoder = (Block(width, heads, depth, hidden) for _ in range(2))
        self.out = nn.Linear(width, shape.width)

    def forward(self, patches: Tensor, cluster: Tensor, parts: Tensor, valid: Tensor) -> Tensor:
        """Return `[B, K, D]`.

        Args:
            patches: `[B, N, C]`, with the code of their places.
            cluster: `[B, N]`, the cluster of each patch.
            parts: `[B, K, N]`, the shares of the patches in the mean of each cluster.
            valid: `[B, K]` bool, False on padding, which no cluster attends to.
        """
        within = cluster[:, :, None] == cluster[:, None, :]
        means = parts @ self.inner_encoder(patches, within)
        rows: Tensor = self.out(self.inter_encoder(means, valid[:, None, :].expand(-1, means.shape[1], -1)))
        return rows


@register("setok", paper="arXiv:2406.05127", needs=Needs(patches=True, grid=True), trained=True)
@dataclass(frozen=True)
class Setok(TrainedMethod):
    """Make one token of each cluster of patches by a small transformer; their number depends on the image.

    The clusters are those of ``setok-cluster``. Patches attend to those of their cluster, a cluster's token is their
    mean, and the tokens of the clusters attend to each other. The slot stands at the centre of its cluster.

    Args:
        weights: "random", or a folder of ``tokensieve train setok``.
        threshold: of density times distance; a smaller one leaves more tokens.
        fallback: clusters if no patch exceeds the threshold, and neighbours that density is measured by.

    Cost: O(N²·C) time and O(N²) extra memory.
    Paper: "Towards Semantic Equivalence of Tokenization in Multimodal LLM", ICLR 2025. It first trains the net to
    reconstruct the image; here the loss of the answers trains it.
    Official code: breaks ties of density by noise, here the earlier patch wins. As released it does not run: the
    transformer among the clusters receives no dimension for the batch.
    """

    threshold: float = 0.5
    fallback: int = 64
    makes_rows: ClassVar = True
    least: ClassVar = {"fallback": 1}

    Net = Tokenizer

    def reduce(self, image: ConnectorTokens) -> Reduction:
        patches, centres, valid, cluster, scores = clusters_of(image, self.threshold, self.fallback)
        net = image.net
        assert isinstance(net, Tokenizer)
        members = one_hot(cluster, centres.shape[1]).transpose(1, 2).float()  # [B, K, N]
        parts = members / members.sum(-1, keepdim=True).clamp(min=1)
        rows = net(patches, cluster, parts, valid)
        return image.made(rows, centres, parts=parts, valid=valid, scores=scores)
