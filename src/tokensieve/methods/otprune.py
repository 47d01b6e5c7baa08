"""OTPrune: keep the tokens that span the similarities of all tokens best."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from tokensieve.budget import Budget
from tokensieve.methods import Method, register
from tokensieve.ops import dpp_map, gram
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens


@register("otprune", paper="arXiv:2602.20205")
@dataclass(frozen=True)
class OtPrune(Method):
    """Keep, greedily, the tokens whose similarities to all tokens have the largest determinant together.

    Each channel is scaled to length one over the tokens, and G holds the products of all pairs of tokens. The
    determinant is that of the kernel I + ``gamma`` · G·Gᵀ, which the paper derives from the 2-Wasserstein distance
    between all tokens and the kept ones.

    Args:
        keep: tokens per image, or a share of them (the official script: 9.8 %).
        gamma: weight of the similarities beside the identity; 0 keeps the first tokens.

    Cost: O(N²·D) time for G, then O(K²·(N + K)) for the 2·K tokens most similar to the others, and more only if
    these do not decide; O(N²) extra memory.
    Paper: "OTPrune: Distribution-Aligned Visual Token Pruning via Optimal Transport", CVPR 2026.
    Official code: is written for one image, takes the tokens at positions 35 and up of a prompt as the image, and
    renumbers positions (``positions="contiguous"``). It holds the factors of the determinant in the model's precision;
    here they are float32.
    """

    keep: Budget = 0.1
    gamma: float = 0.01
    least: ClassVar = {"gamma": 0}

    def reduce(self, image: ConnectorTokens) -> Reduction:
        similarity = gram(normalize(image.features.float(), dim=-2))  # [B, N, N]
        identity = torch.eye(image.total, device=similarity.device).expand_as(similarity)
        # I + gamma · G·Gᵀ is the product of the rows [I, √gamma · G] with themselves
        rows = torch.cat([identity, similarity * self.gamma**0.5], -1)
        return image.keep(dpp_map(rows, rows.norm(dim=-1), image.budget))
