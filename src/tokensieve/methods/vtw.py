"""VTW: withdraw all visual tokens from the deep layers of the LLM."""

import json
import os
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
    """Withdraw every visual token before layer ``layer``, when the text tokens have taken up their information.

    Args:
        layer: the first layer without visual tokens; a float is a share of the depth (the paper: 15 or 16 of 32).
        calibration: a file of ``tokensieve calibrate vtw``, whose layer is used instead.

    Cost: none: no evidence is read.
    Paper: "Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference", AAAI 2025.
    Official code: keeps the positions of the remaining tokens, as here. Its search reports the number of the first
    candidate that is good enough, plus 5, because its candidates begin at layer 5; ``tokensieve calibrate vtw`` reports
    the layer itself. It fails if no candidate is good enough; here that is refused with the smallest divergence.
    """

    layer: int | float = 0.5
    calibration: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration is not None:
            read_calibration(self.calibration)  # a file that cannot be used is refused at once

    def layer_numbers(self, depth: int) -> list[int]:
        if self.calibration is None:
            return super().layer_numbers(depth)
        layer, calibrated_depth = read_calibration(self.calibration)
        if calibrated_depth != depth:
            raise Refusal(f"{self.calibration} is for an LLM of {calibrated_depth} layers; this one has {depth}")
        return replace(self, layer=layer, calibration=None).layer_numbers(depth)

    def reduce(self, image: DecoderTokens) -> Reduction:
        return image.keep(torch.empty((len(image.features), 0), dtype=torch.int64, device=image.features.device))


def read_calibration(file: str) -> tuple[int, int]:
    """Return the layer and the depth in a calibration file; raise ``Refusal`` if it is none."""
    try:
        result = json.loads(Path(os.path.expanduser(file)).read_text(encoding="utf-8"))
        return int(result["layer"]), int(result["depth"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Refusal(f"{file} is no result of 'tokensieve calibrate vtw' ({type(error).__name__}: {error})") from None
