"""The images and videos of a batch of prompts, in one list, in their order in the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokensieve.engine.handoff import EncoderOutputs
from tokensieve.engine.prompt.placeholders import Placeholders
from tokensieve.errors import Refusal
from tokensieve.models import Family
from tokensieve.models.family import Modality
from tokensieve.models.planes import rows_of
from tokensieve.tokens import ByLayer


@dataclass(frozen=True, eq=False)
class PromptImages:
    """The images and videos ("images", for short) of a batch.

    Attributes:
        placeholders: where they stand.
        outputs: the record of their encode calls; it has each image once, however often beams repeat it.
        features: per image of the batch, the rows that the vision encoder made.
        origins: per image of the batch, its number in the record.
        copies: how often beams or several returns repeat a sample.
        by_modality: the numbers of the images that are images, and of those that are videos.
    """

    placeholders: Placeholders
    outputs: EncoderOutputs
    features: list[Tensor]
    origins: list[int]
    copies: int
    by_modality: dict[Modality, list[int]]

    def states(self, number: int) -> ByLayer:
        """Return the states `[M, C]` of one image's patches in the vision encoder."""
        by_layer, origin = self.outputs.by_layer["encoder_states"], self.origins[number]
        return ByLayer({layer: rows[origin] for layer, rows in by_layer.items()}, self.outputs.depth)

    @classmethod
    def of_call(
        cls, family: Family, config: Any, kwargs: dict[str, Any], modality: Modality, encoded: Any
    ) -> PromptImages:
        """Return all images, or all videos, of one encode call.

        Raises:
            Refusal: if they do not fit the placeholders.
        """
        outputs = EncoderOutputs.of(encoded)
        features = family.features_per_image(rows_of(encoded), outputs.layouts)
        ids, mask, token = kwargs["input_ids"], kwargs.get("attention_mask"), getattr(config, f"{modality}_token_id")
        _check_copies(family, ids == token, features, len(features) // max(1, len(outputs.layouts)), modality)
        placeholders = Placeholders.read(ids, mask, token, [len(rows) for rows in features], modality)
        if family.joins_tiles and modality == "image" and any(len(sizes) > 1 for sizes in placeholders.images):
            placeholders, outputs, features = _join_tiles(placeholders, outputs, features)
        origins, copies = _origins(placeholders.images, len(outputs.layouts))
        return cls(placeholders, outputs, features, origins, copies, {modality: list(range(len(features)))})

    def beside(self, second_set: PromptImages) -> PromptImages:
        """Return the images and the videos of the same batch, in their order in the prompts.

        Raises:
            Refusal: if one begins before the previous one has ended.
        """
        (first,), (second,) = self.by_modality, second_set.by_modality
        sources = {first: self, second: second_set}
        numbers = {kind: iter(range(len(source.features))) for kind, source in sources.items()}
        rows = []  # per row, in prompt order: the modality of each image, and its number within its modality
        for spans in zip(self.placeholders.spans(), second_set.placeholders.spans(), strict=True):
            in_order = sorted((*span, kind) for kind, of_kind in zip(sources, spans, strict=True) for span in of_kind)
            if any(following[0] <= before[1] for before, following in pairwise(in_order)):
                raise Refusal("an image stands between the frames of a video; that is not supported")
            rows.append([(kind, next(numbers[kind])) for *_, kind in in_order])
        if self.copies != second_set.copies:
            raise Refusal(f"the batch repeats its images {self.copies} times and its videos {second_set.copies} times")
        flat = [entry for row in rows for entry in row]
        start = {first: 0, second: len(self.outputs.layouts)}  # where each modality begins in the joint record
        # the joint record has each image once, in prompt order: only every first copy of a row counts
        records = [start[kind] + sources[kind].origins[n] for row in rows[:: self.copies] for kind, n in row]
        sizes = [[len(sources[kind].features[n]) for kind, n in row] for row in rows]
        visual = self.placeholders.visual | second_set.placeholders.visual
        end = max(self.placeholders.end, second_set.placeholders.end)
        return PromptImages(
            replace(self.placeholders, visual=visual, images=sizes, end=end),
            self.outputs.beside(second_set.outputs).select(records),
            [sources[kind].features[n] for kind, n in flat],
            *_origins(sizes, len(records)),
            {kind: [i for i, (of_kind, _) in enumerate(flat) if of_kind == kind] for kind in sources},
        )


def _join_tiles(
    placeholders: Placeholders, outputs: EncoderOutputs, features: list[Tensor]
) -> tuple[Placeholders, EncoderOutputs, list[Tensor]]:
    """Make one image of the entries that stand side by side in the prompt."""
    groups = placeholders.side_by_side()
    sizes = [
        [sum(of_row[entry] for entry in group) for group in row_groups]
        for of_row, row_groups in zip(placeholders.images, groups, strict=True)
    ]
    copies = sum(map(len, placeholders.images)) // len(outputs.layouts)
    start, members = 0, []  # the record has each sample once: count the entries of every first copy
    for row_groups in groups[::copies]:
        members += [[start + entry for entry in group] for group in row_groups]
        start += sum(map(len, row_groups))
    remaining = iter(features)
    joined = [torch.cat([next(remaining) for _ in group]) for row_groups in groups for group in row_groups]
    return replace(placeholders, images=sizes), outputs.join_views(members), joined


def _check_copies(family: Family, visual: Tensor, features: list[Tensor], copies: int, kind: str) -> None:
    """Refuse beams that do not show their sample's images: transformers' GLM-4V gives them `A A B B`, not `A B A B`."""
    remaining = list(features)
    for sample, tokens in enumerate((visual.sum(-1).tolist() if copies > 1 else [])[::copies]):
        of_sample: list[Tensor] = []
        while remaining and sum(map(len, of_sample)) < copies * tokens:
            of_sample.append(remaining.pop(0))
        per_copy = len(of_sample) // copies
        pairs = zip(of_sample, of_sample[per_copy:], strict=False)
        if not all(a is b or torch.equal(a, b) for a, b in pairs):
            raise Refusal(
                f"transformers hands the {copies} beams (or returns) of sample {sample} its {per_copy} {kind}s in "
                f"another order in {family.title}, so the model gets wrong ones: take one {kind} per sample, or "
                "num_beams=1 and num_return_sequences=1"
            )


def _origins(images: Sequence[Sequence[int]], encoded: int) -> tuple[list[int], int]:
    """Return the number in the encode call of each image of the batch, and how often a sample is repeated."""
    total = sum(map(len, images))
    copies = total // encoded if encoded else 1
    if copies * encoded != total:
        raise Refusal(f"the batch shows {total} images; {encoded} were encoded")
    origins, start = [], 0
    for row in images[::copies]:
        origins += list(range(start, start + len(row))) * copies
        start += len(row)
    return origins, copies
