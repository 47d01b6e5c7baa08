"""DyVTE: trained gates let all visual tokens leave the LLM, as soon as the text has what it needs of them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from tokensieve.methods import DecoderMethod, DecoderNeeds, ModelShape, TrainedMethod, register
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens, given


class Gate(nn.Module):
    """Map the text's state after one layer `[B, 2D]` to the logits of staying and leaving, `[B, 2]`."""

    def __init__(self, entering: int, width: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(entering, width, bias=False), nn.Linear(width, 2, bias=False)

    def forward(self, state: Tensor) -> Tensor:
        logits: Tensor = self.w2(gelu(self.w1(state)))
        return logits


class Gates(nn.ModuleList):
    """Hold one gate for each layer after which tokens can leave, the first for layer 0."""

    def __init__(self, shape: ModelShape, width: int = 256) -> None:
        super().__init__(Gate(2 * shape.width, width) for _ in range(shape.layers - 1))


@register("dyvte", paper="arXiv:2411.19628", stage="decoder", needs=DecoderNeeds(user_text="all"), trained=True)
@dataclass(frozen=True)
class DyVte(TrainedMethod, DecoderMethod):
    """Let all visual tokens of a prompt leave the LLM after the first layer whose trained gate says so.

    The gate of a layer reads the mean hidden state of the text after the image, without its last token, and that last
    token's. The tokens leave if logit(leave) − logit(stay) exceeds ``threshold``. In training, the label of a layer is
    whether the answer stays the same if the visual tokens leave there, by the rule ``tolerance``; the model is frozen.

    Args:
        weights: "bundled", "random", or a folder of ``tokensieve train dyvte``.
        threshold: larger values keep the tokens for longer; 0 is the paper's rule.
        tolerance: label of a layer in training: "ratio" (the paper): more than 99 % of the answer's likeliest words are
            those of the whole model, and the loss is below 1.03 times its loss. "agree": the first alone, since on a
            model that is sure of its answers hardly any loss passes.

    Cost: O(L·D + D·h) time for each layer until the tokens leave, with L words and gates of h hidden units; O(D) extra
    memory. The device waits for the decision at each of these layers.
    Paper: "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
    2024.
    Official code: batches of one; gates of 2,048 hidden units, here 256; draws one layer for each training step, where
    all layers are labelled here; a right word with the id 0 does not count as a word of the answer.
    """

    threshold: float = 0.0
    tolerance: Literal["ratio", "agree"] = "agree"

    in_training = ("tolerance",)
    Net = Gates
    learns = "exits"
    agreement: ClassVar[float] = 0.99
    ratio: ClassVar[float] = 1.03

    def layer_numbers(self, depth: int) -> list[int]:
        return list(range(1, depth))

    def reduce(self, image: DecoderTokens) -> Reduction:
        text = given(image.user_text)
        rows, last = text.features.float(), text.mask.long().cumsum(-1).argmax(-1, keepdim=True)  # [B, M, D], [B, 1]
        before = text.mask.scatter(1, last, False)[..., None]
        mean = (rows * before).sum(1) / before.sum(1).clamp(min=1)
        state = torch.cat([mean, rows.take_along_dim(last[..., None], 1)[:, 0]], -1)
        gates = given(image.net)
        assert isinstance(gates, Gates)
        stay, leave = gates[image.layer - 1](state).unbind(-1)
        tokens = torch.arange(image.total, device=rows.device).expand(len(rows), -1)
        return image.keep(tokens, counts=torch.where(leave - stay > self.threshold, 0, image.total))

    def may_leave(self, whole: Tensor, early: Tensor, labels: Tensor) -> Tensor:
        """Return whether the visual tokens may leave, `[B]` bool: the training's label of one layer.

        Args:
            whole, early: logits `[B, A, V]` of the answer by the whole model, and with the tokens leaving there.
            labels: `[B, A]`, the answer's ids, −100 where there is none.
        """
        answered = labels >= 0
        same = (whole.argmax(-1) == early.argmax(-1)) & answered
        agrees = same.sum(-1) > self.agreement * answered.sum(-1)
        if self.tolerance == "agree":
            return agrees
        losses = [cross_entropy(logits.mT, labels, reduction="none").sum(-1) for logits in (whole, early)]
        return agrees & (losses[1] < self.ratio * losses[0])
