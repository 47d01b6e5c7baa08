"""VTW: deep blocks do without visual tokens altogether."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tokensieve.errors import Refusal
from tokensieve.methods import DecoderMethod, register
from tokensieve.reduction import Reduction
from tokensieve.tokens import DecoderTokens


@register("vtw", paper="arXiv:2405.05803", stage="decoder")
@dataclass(frozen=True)
class Vtw(DecoderMethod):
    """Withdraw every visual token before block ``layer``: what they had to say is in the text by then.

    Args:
        layer: the first block without visual tokens; a float is a share of the depth (the paper: 15 or 16 of 32).
        calibration: a file of ``tokensieve calibrate vtw``, whose layer is used instead.

    Cost: none: nothing is read.
    Paper: "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference", AAAI 2025.
    """

    layer: int | float = 0.5
    calibration: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration is not None:
            calibrated(self.calibration)  # a file that cannot be used is refused at once

    def layer_numbers(self, depth: int) -> list[int]:
        if self.calibration is None:
            return super().layer_numbers(depth)
        layer, calibrated_depth = calibrated(self.calibration)
        if calibrated_depth != depth:
            raise Refusal(f"{self.calibration} is for an LLM of {calibrated_depth} blocks; this one has {depth}")
        return replace(self, layer=layer, calibration=None).layer_numbers(depth)

    def reduce(self, image: DecoderTokens) -> Reduction:
        return image.keep(torch.empty((len(image.features), 0), dtype=torch.int64, device=image.features.device))


def calibrated(file: str) -> tuple[int, int]:
    """Layer and depth in a calibration file; ``ValueError`` if it is none."""
    try:
        found = json.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        return int(found["layer"]), int(found["depth"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{file} is no result of 'tokensieve calibrate vtw' ({type(error).__name__}: {error})") from None
