"""LLaVA-Mini: a learned query compresses the patches, and a few blocks beside the LLM mix the image into the text."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokensieve.budget import Budget
from tokensieve.errors import Refusal
from tokensieve.methods import ModelShape, Needs, TrainedMethod, register
from tokensieve.methods.compressor import MiniNet
from tokensieve.reduction import Reduction
from tokensieve.tokens import ConnectorTokens, given


@register("llava-mini", paper="arXiv:2501.03895", needs=Needs(patches=True, project=True, grid=True), trained=True)
@dataclass(frozen=True)
class LlavaMini(TrainedMethod):
    """Compress an image to one token, after blocks beside the LLM have mixed the whole image into the text.

    A learned query attends to the patches, and the projector makes the compressed token. All N projected tokens, the
    compressed token and the T text rows then pass blocks of the LLM's kind, in this order and causally. The LLM
    receives the compressed token and the text rows as these blocks left them. Of several images, each passes with the
    text on its own, and the text rows are the means. Answers, and in training columns with a label, stay unchanged.
    So do the words of later turns on a cache: ``reselect=True`` lets the whole conversation pass anew.

    Args:
        weights: "random" (the blocks are copies of the LLM's first layers), a folder of ``tokensieve train
            llava-mini``, or the authors' checkpoint.
        keep: tokens per image, a square number (published: 1).
        blocks: number of untrained blocks; a float is a share of the LLM's depth (published: 4 of 32).

    Cost: the blocks on all N + K + T positions, O((N + T)·D² + (N + T)²·D) time each, and their weights; O(K·N·C) time
    for the compressor. The counts of tokens by layer do not show the blocks.
    Paper: "LLaVA-Mini: Efficient Image and Video Large Multimodal Models with One Vision Token", ICLR 2025. High
    resolution and videos are left out. Our training leaves the LLM frozen, which the authors train, too.
    Official code: numbers the positions of the tokens without gaps: ``positions="contiguous"``. Blocks that were not
    trained have random weights.
    On the bundled model (one block, 179 steps of 32 questions at rate 1e-3), one token answers 41.8 % of 299
    held-out training questions, and 28.1 % untrained; all 144 tokens answer 100 %. No weights are shipped.
    """

    keep: Budget = 1
    blocks: int | float = 0.125
    makes_rows: ClassVar = True

    Net = MiniNet
    copies_layers = True
    changes_text = True
    published = "model.compressor."

    def __post_init__(self) -> None:
        super().__post_init__()
        if (isinstance(self.keep, int) and isqrt(self.keep) ** 2 != self.keep) or not self.blocks > 0:
            raise Refusal(f"llava-mini keeps a square number of tokens, such as 1 or 4, with blocks; got {self}")

    def make_net(self, shape: ModelShape, **sizes: Any) -> nn.Module:
        if not isinstance(self.keep, int) and self.keep != 1.0:  # 1.0 keeps all
            raise Refusal(f"llava-mini has one number of tokens for all images, such as 1 or 4; got keep={self.keep!r}")
        blocks = max(1, round(self.blocks * shape.layers)) if isinstance(self.blocks, float) else self.blocks
        sizes = {"queries": int(self.keep), "blocks": blocks, **sizes}
        if sizes["queries"] != self.keep:
            raise Refusal(f"these weights compress an image to {sizes['queries']} tokens; {self} asks for {self.keep}")
        return super().make_net(shape, **sizes)

    def names_in(self, checkpoint: Iterable[str]) -> dict[str, str]:
        matches = ((name, re.search(r"(compressor|prefusion_layers)\..*(?<!inv_freq)$", name)) for name in checkpoint)
        return {name: match[0] for name, match in matches if match}

    def sizes_of(self, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        numbers = {int(name.split(".")[1]) for name in parameters if name.startswith("prefusion_layers.")}
        return {"queries": len(parameters["compressor.query"]), "blocks": len(numbers)}

    @property
    def reads_question(self) -> bool:
        return True  # the rows of the text are a part of it

    def reduce(self, image: ConnectorTokens) -> Reduction:
        net, patches = image.net, given(image.patches)
        assert isinstance(net, MiniNet)
        if image.grid is None:
            raise Refusal(f"llava-mini needs tokens on a grid; these {image.total} tokens have none")
        mixed, attention = net.compressor(patches.float(), image.grid)
        rows = given(image.project)(mixed.to(patches.dtype).flatten(0, 1)).view(*mixed.shape[:2], -1)
        count = rows.shape[1]
        anchors = torch.arange(count, device=rows.device) * image.total // count
        return image.made(rows, anchors.expand(len(rows), -1), parts=attention)
