"""GlimpsePrune: a learned query looks at the image from behind the prompt, and a predictor keeps what it needs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, DecoderNeeds, ModelShape, TrainedMethod, register
from tokensieve.methods.glimpse import Glimpse
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens, given

LEVELS = (0.97, 0.72, 0.47, 0.22)
NEEDS = DecoderNeeds(grid=True, query_attention="logits", encoder_states=LEVELS)


@register("glimpse-prune", paper="arXiv:2508.01548", stage="decoder", needs=NEEDS, trained=True)
@dataclass(frozen=True)
class GlimpsePrune(TrainedMethod, DecoderMethod):
    """Keep the tokens that a trained predictor takes for those that the question is about, as many as there are.

    A learned row is put behind the prompt, and a learned vector is added to it before each layer. In the last layer
    before ``layer``, a small network reads how all its heads attend to the visual tokens, and what several layers of
    the vision encoder say about them. Tokens with a probability above ``threshold`` stay, at least one. The others
    leave the LLM before ``layer``, and the KV caches of all layers before it. In training, boxes say which tokens a
    question is about; a second loss is that of the answer, read behind the learned row. The model stays frozen.

    No token sees the learned row, so it runs beside the prompt, on the keys and values that each layer has computed:
    prompt, labels and caches stay as they are.

    A short training on the bundled model (``layer=2``, 311 steps) keeps 17 tokens, 85 on average over the layers, and
    answers 93.1 % (91.4 to 94.4) of 1,300 questions. At 85, ``fastv(layer=2)`` gives 86.3, ``random`` 95.0 and ``pool``
    95.7. The loss is in second turns about something else: if tokens are chosen anew there (``reselect``), it answers
    96.8 % (95.3 to 97.9), not told apart from ``pool``. No weights are shipped.

    Args:
        weights: "random", a folder of ``tokensieve train glimpse-prune``, or the authors' (``new_modules_gp.pt``).
        layer: tokens leave before it; a float is a share of the depth (the authors: 19 of 28, 22 of 32).
        threshold: probability from which a token stays.
        keep: the most tokens that stay of an image, or a share of them (the authors' rows at a fixed budget: 0.111).
        levels: layers of the vision encoder; a float is a share of its depth. The default is that for Qwen2.5-VL.
        attention: the predictor reads "logits" of attention, or the "log" of probabilities.

    Cost: one row through the layers before ``layer``, and O(N²·F) time and O(N·F) extra memory for a predictor of F
    columns.
    Paper: "A Glimpse to Compress: Dynamic Visual Token Pruning for Large Vision-Language Models", 2025.
    Official code: appends the row to the prompt and crops it afterwards, which gives the same up to rounding; rounds
    the cap down. Its weights for LLaVA-1.5 need ``attention="log"`` and ``levels=(22, 16, 10, 4)``.
    """

    layer: int | float = 0.68
    threshold: float = 0.5
    keep: Budget | None = None
    levels: tuple[int | float, ...] = LEVELS
    attention: Literal["logits", "log"] = "logits"

    leaves_caches: ClassVar = True
    proportions: ClassVar = ("threshold",)
    Net = Glimpse
    published_file = "new_modules_gp.pt"
    learns = "places"

    @property
    def needs(self) -> DecoderNeeds:
        return replace(NEEDS, query_attention=self.attention, encoder_states=self.levels)

    def make_net(self, shape: ModelShape, **sizes: Any) -> Glimpse:
        return Glimpse(shape, len(self.levels), **sizes)

    def sizes_of(self, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        layers = {"width": "attn_in_proj", "beside": "cond_in_projs.0"}
        return {size: len(parameters[f"attn_fuser.{layer}.weight"]) for size, layer in layers.items()}

    def logits(self, image: DecoderTokens) -> Tensor:
        """Return the predictor's logit for each token, `[B, N]`."""
        net = given(image.net)
        assert isinstance(net, Glimpse)
        if image.coordinates is None:
            raise Refusal(f"glimpse-prune needs tokens on a grid; these {image.total} tokens have none")
        attention, states = given(image.query_attention).transpose(1, 2), image.encoder_states.stack(self.levels)
        out: Tensor = net.attn_fuser(attention.float(), states, image.coordinates.float())
        return out

    def reduce(self, image: DecoderTokens) -> Reduction:
        logits = self.logits(image)
        order = logits.detach().sort(dim=-1, descending=True, stable=True).indices
        if given(image.net).training:  # the logits are what is trained
            return image.keep(order, logits)
        counts = (logits.sigmoid() > self.threshold).sum(-1).clamp(min=1, max=image.budget)
        return image.keep(order, logits, counts=counts)
