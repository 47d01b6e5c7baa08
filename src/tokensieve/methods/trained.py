"""The base of methods that decide by a small net, which is trained beside the frozen model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from tokensieve.methods.base import Method
from tokensieve.reduction import Reduction

Learns: TypeAlias = Literal["answers", "exits", "places", "twig"]
"""What ``tokensieve train`` shows a net."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that a net must fit.

    Attributes:
        type: the model type in the config, such as "llava".
        width: D, the width of the LLM's hidden states, and so of the projector's rows.
        layers: number of layers of the LLM.
        patch_width: C, the width of the rows that enter the projector; 0: unknown.
        tower_width: the width of the vision encoder's hidden states; 0: unknown.
        heads: number of attention heads of the LLM; 0: unknown.
    """

    type: str
    width: int
    layers: int
    patch_width: int = 0
    tower_width: int = 0
    heads: int = 0


def heads_of(width: int, columns: int) -> int:
    """Return how many heads attention over ``width`` columns has: one per ``columns``, or the next smaller number."""
    return next(heads for heads in range(max(width // columns, 1), 0, -1) if width % heads == 0)


@dataclass(frozen=True)
class TrainedMethod(Method):
    """Base of methods with a net. :meth:`reduce` finds it in ``image.net``, float32 and on the device of the tokens.

    A subclass names its net's class in ``Net``, which is made by ``Net(shape, **sizes)`` with a default for each size.
    ``attach`` loads the weights. The net belongs to the handle: the model's own parameters stay as they are.

    Args:
        weights: "bundled" (those shipped for the bundled model), "random" (an untrained net), or a folder that
            ``tokensieve train`` made, or an authors' checkpoint, of which the net alone is read.
    """

    weights: str = "bundled"

    Net: ClassVar[type[nn.Module]]
    copies_layers: ClassVar[bool] = False  # the net copies layers of the LLM: Net(shape, llm=…, **sizes)
    published: ClassVar[str] = ""  # what stands before the net's own names in checkpoints of the authors
    shares_weights: ClassVar[str] = ""  # another method with the same net: its weights fit, too
    published_file: ClassVar[str] = ""  # the authors' file that holds the net alone, in parts
    learns: ClassVar[Learns] = "answers"

    @property
    def softens(self) -> Literal["rows", "attention"]:
        """The part that the factors of :meth:`soften` multiply: rows, or each token's share in the LLM's attention."""
        return "attention"

    @property
    def has_net(self) -> bool:
        """Whether this instance uses its net: parameters may choose a form without one."""
        return True

    def make_net(self, shape: ModelShape, **sizes: Any) -> nn.Module:
        """Return a new net for a model of this shape, with these sizes in place of the default ones."""
        return self.Net(shape, **sizes)

    def sizes_of(self, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the sizes of the net of an authors' checkpoint, from its parameters under the net's own names."""
        return {}

    def names_in(self, checkpoint: Iterable[str]) -> dict[str, str]:
        """Return the net's own names of its parameters in a file of an authors' checkpoint, by their names there."""
        return {name: name.partition(self.published)[2] for name in checkpoint if self.published in name}

    def soften(self, image: Any) -> Tensor | None:
        """Return a factor for each token `[B, N]`: in training, it takes the place of leaving.

        ``None``: tokens leave in training, too.
        """
        return None

    def objective(self, decisions: Sequence[Reduction], progress: float) -> Tensor | None:
        """Return a term of the training loss, beside those of the answer; ``None``: there is none.

        Args:
            decisions: one per image of the batch. Softened ones have the factors as ``mixing.weight``, `[N]`.
            progress: the share of the training that is done, in [0, 1].
        """
        return None

    def __call__(self, image: Any) -> Reduction:
        """Decide as :class:`Method` does, or soften while ``image.net`` is in training mode."""
        budget = image.budget or self.image_budget(image.total)
        if image.net is not None and image.net.training and 0 < budget < image.total:
            factors = self.soften(replace(image, budget=budget))
            if factors is not None:
                tokens = torch.arange(image.total, device=factors.device).expand_as(factors)
                softened: Reduction = image.merge(tokens, tokens, tokens, factors)
                return replace(softened, soft=self.softens == "attention")
        return super().__call__(image)
