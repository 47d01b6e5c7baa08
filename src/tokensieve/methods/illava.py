"""iLLaVA: merge the dropped tokens into one, inside the vision encoder and inside the LLM."""

from dataclasses import dataclass

from tokensieve.budget import Budget
from tokensieve.methods import DecoderMethod, DecoderNeeds, EncoderMethod, EncoderNeeds, register
from tokensieve.ops import merge_by_rank
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens, EncoderTokens, given


@register("illava-encoder", paper="arXiv:2412.06263", stage="encoder", needs=EncoderNeeds(attention_received=True))
@dataclass(frozen=True)
class ILlavaEncoder(EncoderMethod):
    """Keep the most attended tokens in some layers of the vision encoder, and merge the others into one by rank.

    Of r dropped tokens, the r + 1 that receive least attention become one, at the place of the best of them; see
    ``illava-llm``.

    Args:
        keep: tokens per image at the end, the merged ones counted, or a share; equally many leave in each layer.
        layers: the layers in which tokens leave, between attention and MLP; a float is a share of the layers that
            features come from.
        favour_attended: as in ``illava-llm``.

    Cost: in each of its layers O(n²·D) time for all rows of attention, O(n·min(n, 1,024)) extra memory per head.
    Paper: as of ``illava-llm``; there layers 5 to 8 of 26, 92 of 729 tokens in each.
    Official code: as of ``illava-llm``; it takes the number that leaves in each layer, not a budget.
    """

    keep: Budget = 0.5
    layers: tuple[int | float, ...] = (0.2, 0.24, 0.28, 0.32)
    favour_attended: bool = False

    def reduce(self, image: EncoderTokens) -> Reduction:
        return image.merge(*merge_by_rank(given(image.attention_received).float(), image.budget, self.favour_attended))


@register("illava-llm", paper="arXiv:2412.06263", stage="decoder", needs=DecoderNeeds(attention="last"))
@dataclass(frozen=True)
class ILlavaLlm(DecoderMethod):
    """Keep the tokens that the last prompt token attends to most, and merge the others into the best of them by rank.

    Of r dropped tokens, the r + 1 least attended become one, at the place of the most attended among them.

    Args:
        keep: tokens per image from layer ``layer`` on, the merged one counted, or a share.
        average: instead of ``keep``, tokens averaged over all layers.
        layer: the first layer that receives the shorter sequence; a float is a share of the depth.
        favour_attended: give the more attended tokens the larger weight, as in the paper's text; the official code
            does the opposite.

    Cost: as ``fastv``, and O(N·D) time to merge.
    Paper: "iLLaVA: An Image is Worth Fewer Than 1/3 Input Tokens in Large Multimodal Models", 2024.
    Official code: gives the less attended tokens the larger weight, as here; ``favour_attended=True`` is the paper's
    text. It rounds the merged token to float16 whatever the model's precision; here it has that of the model.
    """

    keep: Budget = 0.7
    average: Budget | None = None
    layer: int | float = 0.25
    favour_attended: bool = False

    def reduce(self, image: DecoderTokens) -> Reduction:
        scores = given(image.attention).mean((1, 2))  # over the heads; the one query is the last prompt token
        return image.merge(*merge_by_rank(scores, image.budget, self.favour_attended))
