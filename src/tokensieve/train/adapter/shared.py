"""Questions about the same image share the beginning of their prompts, which then runs once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokensieve.engine.cache import select_rows
from tokensieve.evaluate.prompt import Inputs, generate_arguments
from tokensieve.methods import Method
from tokensieve.models import family_of

PLAIN = {"input_ids", "attention_mask", "pixel_values"}


@dataclass(frozen=True, eq=False)
class SharedPrompts:
    """A batch of B rows as G beginnings, each up to its last image, and B continuations.

    Attributes:
        beginnings: the G beginnings, left-padded to P columns, with each distinct image once.
        of_row: `[B]`, the beginning of each row.
        ids, mask: `[B, S]`, the continuations, left-padded.
    """

    beginnings: Inputs
    of_row: Tensor
    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, model: Any, inputs: Inputs, stages: Sequence[Method], padding: int = 0) -> SharedPrompts | None:
        """Return the shared prompts of a batch; ``None`` where nothing is shared, or sharing would change the result.

        A method that goes by the user's words decides for each question. Models whose positions or masks depend on
        more than the order of the columns are left as they are.

        Args:
            padding: token id on padding.
        """
        text_informed = any(stage.needs.requests("user_text") for stage in stages)
        positioned = hasattr(model.base_model, "rope_deltas")
        if inputs.images is None or inputs.tensors.keys() != PLAIN or text_informed or positioned:
            return None
        ids, mask = inputs.tensors["input_ids"], inputs.tensors["attention_mask"]
        images = ids == model.config.image_token_id
        per_image, remainder = divmod(int(images.sum()), len(inputs.images))
        if remainder or bool((images.sum(-1) % per_image).any()):
            return None  # images of different lengths
        width = ids.shape[1]
        ends = width - images.flip(-1).int().argmax(-1)  # columns up to and including the last placeholder
        groups: dict[tuple[tuple[int, ...], ...], int] = {}
        rows, first = [], 0
        starts, counts = (width - mask.sum(-1)).tolist(), (images.sum(-1) // per_image).tolist()
        for row, start, end, count in zip(ids.tolist(), starts, ends.tolist(), counts, strict=True):
            key = (tuple(row[start:end]), inputs.images[first : first + count])
            rows.append(groups.setdefault(key, len(groups)))
            first += count
        if len(groups) == len(ids):
            return None
        longest = max(len(beginning) for beginning, _ in groups)
        padded = [[padding] * (longest - len(beginning)) + list(beginning) for beginning, _ in groups]
        valid = [[0] * (longest - len(beginning)) + [1] * len(beginning) for beginning, _ in groups]
        tensors = {**inputs.tensors, "input_ids": ids.new_tensor(padded), "attention_mask": mask.new_tensor(valid)}
        later = torch.arange(int(ends.min()), width, device=ids.device) >= ends[:, None]  # [B, S]
        return cls(
            Inputs(tensors, tuple(image for _, of_group in groups for image in of_group)),
            torch.tensor(rows, device=ids.device),
            ids[:, int(ends.min()) :].masked_fill(~later, padding),
            later.to(mask.dtype),
        )

    def logits(self, model: Any, inner: Any, width: int, part: dict[str, int]) -> Tensor:
        """Return the logits `[B, width, V]` of the last columns; the method is attached to ``inner``.

        Args:
            model: ``inner``, or a PEFT model around it.
            part: arguments for logits of the last columns only, where the method allows them.
        """
        beginning = self.beginnings.tensors["attention_mask"]
        few = {"logits_to_keep": 1} if part else {}
        cache = model(**generate_arguments(inner, self.beginnings), **few, use_cache=True).past_key_values
        select_rows(cache, self.of_row)
        # the first word of each row stands behind its image, also where padding is between them
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0) + beginning.shape[1] + family_of(inner).first_position
        logits: Tensor = model(
            input_ids=self.ids,
            attention_mask=torch.cat([beginning[self.of_row], self.mask], 1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **part,
        ).logits
        return logits[:, -width:]
