"""TwigVLM: a few trained blocks beside the LLM rank the visual tokens."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokensieve.budget import Budget, count
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, DecoderNeeds, ModelShape, TrainedMethod, register
from tokensieve.methods.side import SideBlocks
from tokensieve.ops import top_k
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens


@register(
    "twigvlm",
    paper="arXiv:2503.14075",
    stage="decoder",
    needs=DecoderNeeds(attention="last", side_blocks=True),
    trained=True,
)
@dataclass(frozen=True)
class TwigVlm(TrainedMethod, DecoderMethod):
    """Keep the tokens that the last prompt token attends to most in a twig: blocks that run beside the LLM.

    A twig of T blocks receives a copy of all hidden states `[n, D]` that enter layer K. Its blocks are copies of the
    LLM's layers K to K + T − 1, which were trained to predict the answer with a norm and a head of their own; the model
    is frozen. The mean over the heads of the last row of attention in the twig's last block ranks the tokens. R of them
    stay from layer K on, and none from the second layer on. An image of no more than R tokens stays whole.

    Args:
        weights: "random" (copies of the LLM's layers), a folder of ``tokensieve train twigvlm``, or the authors' twig.
        keep: R, the tokens of each image between the two layers, or a share of those that entered the LLM.
        average: instead of ``keep``, tokens averaged over all layers, as the paper counts.
        layers: K, and the layer from which on no token stays; floats are shares of the depth (the paper: 2, 24 of 32).
        blocks: T; a float is a share of the depth (the paper: 3 of 32).

    Cost: T − 1 layers of the LLM on all L positions of the prompt, the queries and keys of one more, and one row of
    attention: O(T·L·D² + T·L²·D) time; the weights of T layers, and O(L·D) extra memory.
    Paper: "Growing a Twig to Accelerate Large Vision-Language Models", ICCV 2025. Its second half, decoding with the
    twig as a draft, is left out: norm and head of the twig serve in training only, and are not stored.
    Official code: batches of one, with eager attention in the last block.
    On the bundled model (layers 1 and 3 of 4, one block, 1,300 questions, trained for 184 steps of 48 questions at rate
    1e-3), keep=25%, 11% and 5% give 80.6 % (78.7 to 82.4), 79.2 % (77.4 to 81.0) and 78.5 % (76.7 to 80.2), at averages
    of 57.3, 46.7 and 41.9 of 153 tokens; the untrained copy gives 79.8, 78.5 and 77.5 %, and
    ``vtw(layer=3)``, which keeps all until then, 79.8 %: the second layer costs the most. No weights are shipped.
    """

    keep: Budget = 0.25
    average: Budget | None = None
    layers: tuple[int | float, ...] = (0.0625, 0.75)
    blocks: int | float = 0.1

    Net = SideBlocks
    copies_layers = True
    learns = "twig"
    published = "model.layers."

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) != 2 or not self.blocks > 0:
            raise Refusal(f"{self} needs two layers and at least one block")

    def make_net(self, shape: ModelShape, **sizes: Any) -> nn.Module:
        number = max(1, round(self.blocks * shape.layers)) if isinstance(self.blocks, float) else self.blocks
        own_sizes = {"layer": self.layer_numbers(shape.layers)[0], "blocks": number}
        stored = {name: sizes.pop(name, value) for name, value in own_sizes.items()}
        if stored != own_sizes:
            texts = [f"{s['blocks']} blocks from layer {s['layer']} on" for s in (stored, own_sizes)]
            raise Refusal(f"these weights are a twig of {texts[0]}; {self} asks for {texts[1]}")
        return super().make_net(shape, **own_sizes, **sizes)

    def sizes_of(self, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"blocks": 1 + max(int(name.split(".")[0]) for name in parameters)}

    def stage_budgets(self, total: int, layers: Sequence[int], depth: int) -> list[int] | None:
        if self.average is None or depth == 1:
            kept = count(self.keep, total)
        else:
            assert not isinstance(self.average, str)
            mean_tokens = self.average if isinstance(self.average, int) else self.average * total
            (first, last), kept = layers, total
            if mean_tokens < total:
                kept = math.ceil((depth * mean_tokens - first * total) / (last - first))
            if not 0 < kept <= total:
                low, high = first * total / depth, last * total / depth
                raise Refusal(f"{self}: of {total} tokens, averages above {low:g} up to {high:g} are in reach")
        return [kept, 0 if kept < total else total]

    def reduce(self, image: DecoderTokens) -> Reduction:
        if image.attention is None:  # the second layer
            return image.keep(torch.empty((len(image.features), 0), dtype=torch.int64, device=image.features.device))
        scores = image.attention.mean((1, 2))  # over the heads; the one query is the last prompt token
        return image.keep(top_k(scores, image.budget), scores)
