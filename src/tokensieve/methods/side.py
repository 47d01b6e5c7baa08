"""Blocks of a net that run beside the LLM, on a copy of its hidden states."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokensieve.errors import Refusal, first_line
from tokensieve.methods.trained import ModelShape


class SideBlocks(nn.ModuleList):
    """Copies of consecutive layers of an LLM, with the same class, config and weights.

    Args:
        llm: the LLM, which stays as it is.
        layer: the number of the first layer that is copied.
        blocks: how many are copied.

    Raises:
        Refusal: if the LLM has too few layers, or its weights cannot be copied.
    """

    def __init__(self, shape: ModelShape, llm: Any, layer: int, blocks: int) -> None:
        copied = list(llm.layers)[layer : layer + blocks]
        if len(copied) < blocks:
            raise Refusal(
                f"{blocks} blocks from layer {layer} on are copied; this LLM has layers 0 to {shape.layers - 1}"
            )
        # made anew, not cloned: hooks and probes on the model's own layers must not come along
        super().__init__(type(part)(llm.config, number) for number, part in enumerate(copied, layer))
        self.sizes = {"layer": layer, "blocks": blocks}
        for block, part in zip(self, copied, strict=True):
            try:
                block.load_state_dict(part.state_dict())
            except RuntimeError as error:
                raise Refusal(
                    "copies are made of an LLM's plain layers; load it without quantisation and adapters "
                    f"({first_line(error)})"
                ) from None

    def forward(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Run the blocks on hidden states `[B, n, D]`, with the arguments of the layer that would receive them."""
        for block in self:
            output = block(hidden, **arguments)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden
