"""Train a net that finds the tokens that a question is about: boxes say where they are, and the model is frozen.

The loss is the cross-entropy of the answer, read behind the net's learned query, and two terms of the kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache

from tokensieve.engine.connector.shorten import position_ids
from tokensieve.engine.decoder.learned_query import norm_eps, pass_beside, rotary
from tokensieve.engine.decoder.masks import attention_kinds
from tokensieve.engine.wrapped import uncompiled
from tokensieve.evaluate import Sample
from tokensieve.evaluate.prompt import (
    generate_arguments,
    image_numbers,
    left_padded_batch,
    user_turns,
    without_repetitions,
)
from tokensieve.loading import to_model
from tokensieve.models import family_of
from tokensieve.train.adapter.data import IGNORED, Collator, commonest_answer, opened_images
from tokensieve.train.adapter.loss import answer_loss
from tokensieve.train.method.answers import MethodTrainer

BCE = 0.1  # weight of the binary cross-entropy beside the Dice loss


class PlacesCollator(Collator):
    """Convert samples to prompts without answers, ``labels`` `[B, A]` that follow them, and boxes.

    ``boxes`` `[B, M, 4]` are (left, top, right, bottom) as shares of the last image, zeros on padding.
    """

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        images = opened_images(samples)
        texts, turns = user_turns(samples, self.prompt)
        tensors = left_padded_batch(self.processor, images, texts, turns)
        answers = [
            self.answer_ids(*row) for row in zip(images, texts, turns, map(commonest_answer, samples), strict=True)
        ]
        boxes = [
            torch.tensor(sample.boxes or [(0.0,) * 4]) / torch.tensor(of_row[-1].size * 2)
            for sample, of_row in zip(samples, images, strict=True)
        ]
        labels = pad_sequence([torch.tensor(ids) for ids in answers], batch_first=True, padding_value=IGNORED)
        return {
            **tensors,
            "labels": labels,
            "boxes": pad_sequence(boxes, batch_first=True),
            "image_numbers": torch.tensor(image_numbers(samples)),
        }


class PlacesTrainer(MethodTrainer):
    """Train on the answer behind the learned query, and on the tokens that the boxes cover."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **ignored: Any) -> Any:
        labels, boxes, numbers = (inputs[name] for name in ("labels", "boxes", "image_numbers"))
        prompts = {name: rows for name, rows in inputs.items() if name not in ("labels", "boxes", "image_numbers")}
        once = without_repetitions(self.vlm, to_model(self.vlm, prompts), numbers.tolist())
        arguments, cache = generate_arguments(self.vlm, once), DynamicCache()
        self.vlm(**arguments, past_key_values=cache, use_cache=True)  # in training nothing leaves
        logits = self._behind_query(model, arguments, cache, labels)
        terms = [answer_loss(logits, labels.to(logits.device))]
        for images, of_row in zip(self.sieve.last, boxes, strict=True):
            decision = images[-1]
            assert decision.grid is not None  # refused by the method
            inside = covered(of_row, decision.grid)
            if inside.any() and decision.scores is not None:
                terms.append(mask_loss(decision.scores, inside.to(decision.scores)) / len(boxes))
        loss = torch.stack(terms).sum()
        return (loss, {"logits": logits}) if return_outputs else loss

    def _behind_query(self, net: Any, arguments: dict[str, Any], cache: DynamicCache, labels: Tensor) -> Tensor:
        """Return the logits `[B, A, V]` of the answer's ids behind the learned query, which is behind the prompt."""
        decoder, family = uncompiled(self.vlm.get_decoder()), family_of(self.vlm)
        positions = position_ids(family, self.vlm.base_model, arguments)
        positions = positions[-3:] if positions.ndim == 3 else positions
        later = torch.arange(1, labels.shape[1] + 1, device=positions.device)
        known = self.vlm.get_input_embeddings()(labels[:, :-1].clamp(min=0))
        rows = torch.cat([known.new_zeros(len(known), 1, known.shape[-1]), known], 1)
        rope: dict[str, Any] = {}
        mask = arguments.get("attention_mask")
        for number, kind in enumerate(attention_kinds(decoder.config)):
            added = net.added(number, norm_eps(decoder)).to(rows)
            rows = torch.cat([rows[:, :1] + added, rows[:, 1:]], 1)
            if kind not in rope:
                rope[kind] = rotary(decoder, kind, rows, positions[..., -1:] + later)
            layer = cache.layers[number]
            rows = pass_beside(decoder, number, kind, rows, (layer.keys, layer.values), mask, rope[kind], {})
        logits: Tensor = self.vlm.get_output_embeddings()(decoder.norm(rows))
        return logits.float()


def covered(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return which cells of a grid a box touches, `[N]` bool.

    Args:
        boxes: `[M, 4]`, (left, top, right, bottom) as shares of the image; zeros on padding.
    """

    def touched(low: Tensor, high: Tensor, cells: int) -> Tensor:
        cell = torch.arange(cells, device=boxes.device)
        return (cell >= (low * cells).floor()[:, None]) & (cell <= (high * cells).floor()[:, None])

    left, top, right, bottom = boxes[boxes[:, 2] > boxes[:, 0]].unbind(-1)
    cells = touched(top, bottom, grid[0])[:, :, None] & touched(left, right, grid[1])[:, None]
    return cells.any(0).flatten()


def mask_loss(logits: Tensor, inside: Tensor) -> Tensor:
    """Return the Dice loss of the probabilities, plus a tenth of the binary cross-entropy, of one image.

    Args:
        logits: `[N]`.
        inside: `[N]`, 1 on the tokens that the question is about, else 0.
    """
    likely = logits.sigmoid()
    dice = 1 - (2 * (likely * inside).sum() + 1e-6) / (likely.sum() + inside.sum() + 1e-6)
    return dice + BCE * binary_cross_entropy_with_logits(logits, inside)
