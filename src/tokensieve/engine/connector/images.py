"""What a batch of prompts shows: its images and its videos, in one list, in their order in the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokensieve.engine.encoder.hooks import RECORD, EncoderOutputs
from tokensieve.engine.prompt.placeholders import Placeholders
from tokensieve.errors import Refusal
from tokensieve.models import Family
from tokensieve.models.family import Modality


@dataclass(frozen=True, eq=False)
class PromptImages:
    """The images and videos ("images", for short) of a batch.

    Attributes:
        layout: where they stand.
        record: what their encode calls told; of each image once, however often beams repeat it.
        features: per image of the batch, the rows that the encoder made.
        origins: per image of the batch, its number in the record.
        copies: how often beams or several returns repeat a sample.
        groups: per modality, which images of the batch are of it.
    """

    layout: Placeholders
    record: EncoderOutputs
    features: list[Tensor]
    origins: list[int]
    copies: int
    groups: dict[Modality, list[int]]

    @classmethod
    def read(
        cls, family: Family, config: Any, kwargs: dict[str, Any], modality: Modality, encoded: Any
    ) -> PromptImages:
        """All images, or all videos, that one encode call made.

        Raises:
            ValueError: if these do not fit the placeholders.
        """
        record: EncoderOutputs = getattr(encoded, RECORD)
        features = family.entries(encoded.pooler_output, record.shapes)
        ids, mask, token = kwargs["input_ids"], kwargs.get("attention_mask"), getattr(config, f"{modality}_token_id")
        _check_copies(family, ids == token, features, len(features) // max(1, len(record.shapes)), modality)
        layout = Placeholders.read(ids, mask, token, [len(f) for f in features], modality)
        if family.joins and modality == "image" and any(len(sizes) > 1 for sizes in layout.images):
            layout, record, features = _joined(layout, record, features)
        origins, copies = _origins(layout.images, len(record.shapes))
        return cls(layout, record, features, origins, copies, {modality: list(range(len(features)))})

    def beside(self, other: PromptImages) -> PromptImages:
        """Images and videos of the same batch, in their order in the prompts.

        Raises:
            ValueError: if one begins before another has ended.
        """
        (mine,), (theirs,) = self.groups, other.groups
        sources = {mine: self, theirs: other}
        left = {kind: iter(range(len(source.features))) for kind, source in sources.items()}
        rows = []  # per row, in order: what it is, and its number among its kind
        for spans in zip(self.layout.spans(), other.layout.spans(), strict=True):
            placed = sorted((*span, kind) for kind, own in zip(sources, spans, strict=True) for span in own)
            if any(second[0] <= first[1] for first, second in pairwise(placed)):
                raise Refusal("an image stands between the frames of a video; that is not supported")
            rows.append([(kind, next(left[kind])) for *_, kind in placed])
        if self.copies != other.copies:
            raise Refusal(f"the batch repeats its images {self.copies} times and its videos {other.copies} times")
        flat, first = [entry for row in rows for entry in row], {mine: 0, theirs: len(self.record.shapes)}
        numbers = [first[kind] + sources[kind].origins[n] for row in rows[:: self.copies] for kind, n in row]
        features = [sources[kind].features[n] for kind, n in flat]
        images = [[len(sources[kind].features[n]) for kind, n in row] for row in rows]
        visual, end = self.layout.visual | other.layout.visual, max(self.layout.end, other.layout.end)
        return PromptImages(
            replace(self.layout, visual=visual, images=images, end=end),
            self.record.beside(other.record).of(numbers),
            features,
            *_origins(images, len(numbers)),
            {kind: [i for i, (of, _) in enumerate(flat) if of == kind] for kind in sources},
        )


def _joined(
    layout: Placeholders, record: EncoderOutputs, features: list[Tensor]
) -> tuple[Placeholders, EncoderOutputs, list[Tensor]]:
    """With entries that stand side by side in the prompt as one image."""
    groups = layout.side_by_side()
    sizes = [[[layout.images[row][i] for i in group] for group in of_row] for row, of_row in enumerate(groups)]
    copies = sum(map(len, layout.images)) // len(record.shapes)
    first, members = 0, []
    for of_row in groups[::copies]:
        members += [[first + i for i in group] for group in of_row]
        first += sum(map(len, of_row))
    rest = iter(features)
    whole = [torch.cat([next(rest) for _ in group]) for of_row in groups for group in of_row]
    images = [[sum(group) for group in of_row] for of_row in sizes]
    return replace(layout, images=images), record.joined(members), whole


def _check_copies(family: Family, visual: Tensor, features: list[Tensor], copies: int, kind: str) -> None:
    """Refuse beams that do not show their sample's images: transformers' GLM-4V gives them `A A B B`, not `A B A B`."""
    rest = list(features)
    for sample, tokens in enumerate((visual.sum(-1).tolist() if copies > 1 else [])[::copies]):
        of_sample: list[Tensor] = []
        while rest and sum(map(len, of_sample)) < copies * tokens:
            of_sample.append(rest.pop(0))
        shown = len(of_sample) // copies
        pairs = zip(of_sample, of_sample[shown:], strict=False)
        if not all(a is b or torch.equal(a, b) for a, b in pairs):
            raise Refusal(
                f"transformers hands the {copies} beams (or returns) of sample {sample} its {shown} {kind}s in another "
                f"order in {family.title}, and the model sees the wrong ones: take one {kind} per sample, or "
                "num_beams=1 and num_return_sequences=1"
            )


def _origins(images: Sequence[Sequence[int]], encoded: int) -> tuple[list[int], int]:
    """Index in the encode call of each image in the batch, and how often beams or several returns repeat a sample."""
    total = sum(map(len, images))
    copies = total // encoded if encoded else 1
    if copies * encoded != total:
        raise Refusal(f"the batch shows {total} images; the encoder saw {encoded}")
    origins, first = [], 0
    for row in images[::copies]:
        origins += list(range(first, first + len(row))) * copies
        first += len(row)
    return origins, copies
