"""IDPruner: keep tokens that are important and that differ from each other."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokensieve.methods import Needs, register
from tokensieve.methods.needs import StageNeeds
from tokensieve.methods.visionselector import VisionSelector
from tokensieve.ops import marginal_relevance
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens

UNTRAINED = "none"


@register("idpruner", paper="arXiv:2602.13315", needs=Needs(cls_attention=-2))
@dataclass(frozen=True)
class IdPruner(VisionSelector):
    """Keep, greedily, the token with the largest difference of importance and cosine to the nearest kept token.

    Importance is scaled to [0, 1] over the image. It comes from the trained scorer of ``visionselector``, as in the
    paper; without weights it is the attention of [CLS], which is our reading of a form that needs no training.

    Args:
        weights: "none" (attention in the place of the scorer), "bundled", "random", a folder of ``tokensieve train
            idpruner`` or ``visionselector``, or the authors' checkpoint of the same model.
        keep: tokens per image, or a share of them.
        balance: the share of importance in the difference, λ in the paper.
        softened, first, last: as in ``visionselector``, which is trained in the same way.

    Cost: O(K·N·D) time, O(N·D) extra memory.
    Paper: "IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs", 2026.
    Official code: can keep several tokens per step (``parallel_k``), and runs code that lies beside its weights; here
    only numbers are read. Of equal differences the earlier token wins, which is open there.
    """

    weights: str = UNTRAINED
    balance: float = 0.5
    proportions: ClassVar = ("balance",)

    shares_weights: ClassVar = "visionselector"

    @property
    def has_net(self) -> bool:
        return self.weights != UNTRAINED

    @property
    def by_score(self) -> bool:
        return False

    @property
    def needs(self) -> StageNeeds:
        return Needs() if self.has_net else self.info.needs

    def score(self, image: ConnectorTokens) -> Tensor:
        return super().score(image) if self.has_net else image.cls_attention[-2]

    def reduce(self, image: ConnectorTokens) -> Reduction:
        scores = self.score(image)
        low, high = scores.aminmax(dim=-1, keepdim=True)
        importance = (scores - low) / (high - low + 1e-6)
        return image.keep(marginal_relevance(image.features, importance, image.budget, self.balance), scores)
