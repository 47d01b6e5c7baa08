"""Where VTW may withdraw the visual tokens: the first block from which the answer's distribution hardly changes."""

from __future__ import annotations

import json
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
from tokensieve.methods.vtw import Vtw

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Calibration:
    """The result of a search; ``vtw(calibration="file.json")`` reads it.

    Attributes:
        layer: the first block without visual tokens; ``None`` if no block was good enough.
        depth: blocks of the LLM.
        threshold: largest mean divergence that was accepted.
        blocks: candidates, ascending.
        divergence: KL(withdrawn ‖ full) of the first answer token for each of them, mean over the samples, in nats.
        samples: ids of the samples.
    """

    layer: int | None
    depth: int
    threshold: float
    blocks: tuple[int, ...]
    divergence: tuple[float, ...]
    samples: tuple[str, ...]

    def save(self, path: str | Path) -> None:
        """Write as JSON. Raises :class:`OutputError` if the file cannot be written, ``ValueError`` without a layer."""
        if self.layer is None:
            best = min(self.divergence)
            raise Refusal(
                f"no block of {list(self.blocks)} is good enough: the smallest divergence is {best:.2g}, the threshold "
                f"{self.threshold:g}"
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
    """Search VTW's layer as its paper does: one prefill per sample and block, none of them needs an answer.

    Args:
        samples: the paper takes 20.
        threshold: largest accepted mean divergence (the paper: 0.003 for LLaVA-1.5-7B, 0.0005 for 13B).
        first: first candidate block; by default 5 of 32 (the paper), as a share of the depth.
        prompt: what the user says; ``{question}`` is replaced.
        progress: called with (done, total, what is running).

    Raises:
        ValueError: without samples, or if the LLM has no candidate block.
    """
    depth = len(model.get_decoder().layers)
    first = max(1, round(depth * 5 / 32)) if first is None else first
    blocks = list(range(first, depth))
    if not samples:
        raise Refusal("calibration needs at least one sample")
    if not 1 <= first < depth:
        raise Refusal(f"the first candidate block must be 1 to {depth - 1} in this LLM; got {first}")
    check_texts(processor, samples, prompt)
    divergences = []
    for number, sample in enumerate(samples):
        if progress is not None:
            progress(number, len(samples), sample.id)
        inputs = _on_device(model, encode(processor, [sample], prompt=prompt))
        full, withdrawn = _logits(model, inputs), []
        for block in blocks:
            with attach(model, Vtw(layer=block)):
                withdrawn.append(_logits(model, inputs))
        divergences.append(withdrawal_kl(full, torch.stack(withdrawn)))
    mean = torch.stack(divergences).mean(0).tolist()
    layer = first_below(blocks, mean, threshold)
    return Calibration(layer, depth, threshold, tuple(blocks), tuple(mean), tuple(sample.id for sample in samples))


def withdrawal_kl(full: Tensor, withdrawn: Tensor) -> Tensor:
    """KL(withdrawn ‖ full) of two sets of logits `[…, V]`, in nats."""
    ours, whole = withdrawn.float().log_softmax(-1), full.float().log_softmax(-1)
    return (ours.exp() * (ours - whole)).sum(-1)


def first_below(blocks: Sequence[int], divergence: Sequence[float], threshold: float) -> int | None:
    """The first block whose divergence is at most the threshold."""
    return next((block for block, value in zip(blocks, divergence, strict=True) if value <= threshold), None)


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits after the prompt of one sample, `[V]`."""
    logits: Tensor = model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
    return logits


def _on_device(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    moved = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    return {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in moved.items()}
