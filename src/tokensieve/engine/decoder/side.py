"""Run the blocks of a net beside the LLM: on a copy of the hidden states, without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tokensieve.engine.probe import Probe
from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod
from tokensieve.methods.side import SideBlocks


def check_side_blocks(method: DecoderMethod, blocks: SideBlocks, kinds: Sequence[str]) -> None:
    """Refuse blocks that attend in several ways: all run with mask and positions of one layer."""
    first = blocks.sizes["layer"]
    copied = set(kinds[first : first + len(blocks)])
    if len(copied) > 1:
        raise Refusal(f"{method} copies layers with one kind of attention; these have {', '.join(sorted(copied))}")


def run_beside(blocks: SideBlocks, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Return the hidden states `[B, n, D]` after the blocks, in their own precision.

    Args:
        hidden: the input of a layer of the LLM.
        arguments: its other arguments. Its cache is not touched.
    """
    dtype = next(blocks.parameters()).dtype

    def convert(part: Tensor) -> Tensor:
        return part.to(dtype) if part.is_floating_point() else part

    output: Tensor = blocks(convert(hidden), tree_map_only(Tensor, convert, {**arguments, "past_key_values": None}))
    return output


def read_beside(blocks: SideBlocks, probe: Probe, hidden: Tensor, arguments: dict[str, Any]) -> None:
    """Run the blocks up to the queries and keys of the last, which the probe reads.

    They compute in the LLM's precision, as its own layers do: in float32 they would cost more than all others.
    """
    blocks.to(hidden.device, hidden.dtype)
    with torch.no_grad(), probe.stop_at_reading():
        run_beside(blocks, hidden, arguments)
