"""Demand cover: keep tokens that cover the distinct content of the image, half of it weighted by the user's words."""

from dataclasses import dataclass

from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.methods import Method, Needs, register
from tokensieve.ops import CHUNK, coverage, gram, normalise, rows_at
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given


@register("demand-cover", paper="this project", needs=Needs(cls_attention=-2, user_text=True))
@dataclass(frozen=True)
class DemandCover(Method):
    """Keep, greedily, the tokens that best cover the demand of all tokens, of which the words raise a half.

    A token's salience is its attention from [CLS] times its squared distance to the image's mean token, to the power
    ``contrast``. Half of the demand goes to tokens by salience, and half by salience times relevance: the softmax of
    each word's cosines to all tokens in the LLM's input space, summed over the words. Token j covers token i by the
    cosine of their differences to the mean, to the power ``sharpness``. ``repair="size"`` suits it.

    Args:
        keep: tokens per image, or a share of them.
        contrast: exponent of the salience; a smaller one spreads the demand.
        sharpness: exponent of the cosine; with a larger one a token covers fewer others.
        text_weight: demand that the words weight, against 1 that they do not; 0 ignores them.
        text_temperature: of the softmax.

    Cost: O(N·(N + M)·D) time for the gains of all tokens, then K lazy steps over the 16 best or more;
    O(N·min(N, 1,024)) extra memory.
    Paper: none; the idea, its ablations and its results are on [a page](../demand-cover.md) of
    """

    keep: Budget = 64
    contrast: float = 0.75
    sharpness: float = 6.0
    text_weight: float = 1.0
    text_temperature: float = 0.02

    def reduce(self, image: ConnectorTokens) -> Reduction:
        differences = self.differences(image.features.float())
        rows, demand = normalise(differences), self.demand(image, differences)

        def weighted(cosines: Tensor) -> Tensor:
            return cosines.clamp_(min=0).pow_(self.sharpness).mul_(demand[:, None])

        def covers(index: Tensor) -> Tensor:
            return weighted(rows_at(rows, index) @ rows.mT)

        # up to CHUNK tokens the table of all pairs is held; above, rows of it are computed when they are needed
        table = weighted(gram(rows)) if image.total <= CHUNK else covers
        return image.keep(coverage(table, demand, image.budget), demand)

    def demand(self, image: ConnectorTokens, differences: Tensor) -> Tensor:
        """Return the demand of each token, `[B, N]`, from the differences `[B, N, D]` to the mean token."""
        salience = shares(self.salience(image.cls_attention[-2], differences)) ** self.contrast
        return shares(salience) + self.text_weight * shares(salience * self.relevance(image))

    def differences(self, features: Tensor) -> Tensor:
        """Return each token's difference to the image's mean token, `[B, N, D]`: cosines then ignore the part that all share."""
        return features - features.mean(1, keepdim=True)

    def salience(self, attention: Tensor, differences: Tensor) -> Tensor:
        """Return attention `[B, N]` times squared length: a token must be attended to, and unlike the mean."""
        return attention * differences.square().sum(-1)

    def relevance(self, image: ConnectorTokens) -> Tensor:
        """Return the words' shares in each token, `[B, N]`; a word that resembles all tokens shares out evenly."""
        text = given(image.user_text)
        cosines = normalise(text.features) @ normalise(image.features).mT  # [B, M, N]
        return ((cosines / self.text_temperature).softmax(-1) * text.mask[..., None]).sum(1)  # 0 for padding


def shares(weights: Tensor) -> Tensor:
    """Scale weights `[B, N]` to a sum of 1; zeros stay zeros."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
