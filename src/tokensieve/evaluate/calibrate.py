"""Calibration of VTW: find the first layer from which the visual tokens hardly change the answer's distribution."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokensieve.engine import attach
from tokensieve.errors import OutputError, Refusal
from tokensieve.evaluate.data import Sample
from tokensieve.evaluate.prompt import check_texts, encode
from tokensieve.loading import to_model
from tokensieve.methods.vtw import Vtw

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """The result of a search; ``vtw(calibration="file.json")`` reads it.

    Attributes:
        layer: the first layer without visual tokens; ``None`` if no layer is good enough.
        depth: number of layers of the LLM.
        threshold: largest accepted mean divergence.
        layers: candidates, ascending.
        divergence: KL(withdrawn ‖ full) of the first answer token for each candidate, mean over the samples, in nats.
        samples: ids of the samples.
    """

    layer: int | None
    depth: int
    threshold: float
    layers: tuple[int, ...]
    divergence: tuple[float, ...]
    samples: tuple[str, ...]

    def save(self, path: str | Path) -> None:
        """Write as JSON; raise :class:`OutputError` if that fails, :class:`Refusal` without a layer."""
        if self.layer is None:
            best = min(self.divergence)
            # two digits, rounded up, so that the suggested threshold is never below the divergence
            digit = 10.0 ** (math.floor(math.log10(best)) - 1)
            enough = float(f"{math.ceil(best / digit) * digit:.3g}")
            raise Refusal(
                f"no layer of {list(self.layers)} is good enough: the smallest divergence is {best:.2g}, the threshold "
                f"{self.threshold:g}. A threshold of {enough:g} would choose layer "
                f"{first_below(self.layers, self.divergence, enough)}, at the cost of other answers"
            )
        try:
            Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


@torch.inference_mode()
def calibrate_vtw(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    threshold: float = 0.003,
    first: int | None = None,
    prompt: str = "{question}",
    progress: Progress | None = None,
) -> Calibration:
    """Search VTW's layer as its paper does: one prefill per sample and layer, without answers.

    Args:
        samples: the paper uses 20.
        threshold: largest accepted mean divergence (the paper: 0.003 for LLaVA-1.5-7B, 0.0005 for 13B).
        first: first candidate layer; by default 5 of 32 (the paper), as a share of the depth.
        prompt: text of the user turn; ``{question}`` is replaced.
        progress: called with (done, total, current sample).

    Raises:
        Refusal: no samples, or no candidate layer in this LLM.
    """
    depth = len(model.get_decoder().layers)
    first = max(1, round(depth * 5 / 32)) if first is None else first
    layers = list(range(first, depth))
    if not samples:
        raise Refusal("calibration needs at least one sample")
    if not 1 <= first < depth:
        raise Refusal(f"the first candidate layer must be 1 to {depth - 1} in this LLM; got {first}")
    check_texts(processor, samples, prompt)
    divergences = []
    for number, sample in enumerate(samples):
        if progress is not None:
            progress(number, len(samples), sample.id)
        inputs = to_model(model, encode(processor, [sample], prompt=prompt))
        full, withdrawn = _logits(model, inputs), []
        for layer in layers:
            with attach(model, Vtw(layer=layer)):
                withdrawn.append(_logits(model, inputs))
        divergences.append(withdrawal_kl(full, torch.stack(withdrawn)))
    mean = torch.stack(divergences).mean(0).tolist()
    chosen = first_below(layers, mean, threshold)
    return Calibration(chosen, depth, threshold, tuple(layers), tuple(mean), tuple(sample.id for sample in samples))


def withdrawal_kl(full: Tensor, withdrawn: Tensor) -> Tensor:
    """Return KL(withdrawn ‖ full) of two sets of logits `[…, V]`, in nats."""
    log_p, log_q = withdrawn.float().log_softmax(-1), full.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def first_below(layers: Sequence[int], divergence: Sequence[float], threshold: float) -> int | None:
    """Return the first layer whose divergence is at most the threshold."""
    return next((layer for layer, value in zip(layers, divergence, strict=True) if value <= threshold), None)


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits after the prompt of one sample, `[V]`."""
    logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
    return logits
