"""METER with its heads: question answering, pairs of images, retrieval."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers.modeling_outputs import SequenceClassifierOutput

from tokensieve.errors import Refusal
from tokensieve.fusion.meter.configuration import MeterConfig
from tokensieve.fusion.meter.modeling import MeterModel, MeterPreTrainedModel


def _loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Return cross-entropy for class numbers `[B]`, or binary cross-entropy for soft scores `[B, classes]`."""
    if labels is None:
        return None
    if labels.ndim == 1:
        return cross_entropy(logits, labels)
    return binary_cross_entropy_with_logits(logits, labels) * labels.shape[1]


class _MeterClassifier(MeterPreTrainedModel):
    """METER with a classifier on the pooled rows of ``images`` passes, `[B, images · 2D]`."""

    images: ClassVar[int]

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.meter = MeterModel(config)
        width = config.hidden_size * 2
        layers = nn.Linear(width * self.images, width), nn.LayerNorm(width), nn.GELU()
        self.classifier = nn.Sequential(*layers, nn.Linear(width, config.num_labels))
        self.post_init()


class MeterForQuestionAnswering(_MeterClassifier):
    """Choose one of ``num_labels`` answers; three labels are visual entailment."""

    images = 1

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """``labels``: class numbers `[B]`, or soft scores `[B, num_labels]` as in VQAv2."""
        pooled = self.meter(input_ids, attention_mask=attention_mask, pixel_values=pixel_values).pooler_output
        logits = self.classifier(pooled)
        return SequenceClassifierOutput(loss=_loss(logits, labels), logits=logits)


class MeterForImagesAndTextClassification(_MeterClassifier):
    """Classify a statement about two images (NLVR2) from the concatenated pooled rows of one pass per image."""

    images = 2

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """``pixel_values``: `[B, 2, 3, height, width]`."""
        if pixel_values is None or pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            got = None if pixel_values is None else list(pixel_values.shape)
            raise Refusal(f"pixel_values must be [B, 2, 3, height, width], two images per text; got {got}")
        passes = [
            self.meter(input_ids, attention_mask=attention_mask, pixel_values=image, image_token_type_idx=index + 1)
            for index, image in enumerate(pixel_values.unbind(1))
        ]
        logits = self.classifier(torch.cat([out.pooler_output for out in passes], -1))
        return SequenceClassifierOutput(loss=_loss(logits, labels), logits=logits)


class MeterForImageAndTextRetrieval(MeterPreTrainedModel):
    """Score the match of a text and an image, `[B, 1]`."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        self.meter = MeterModel(config)
        self.rank_output = nn.Linear(config.hidden_size * 2, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        pooled = self.meter(input_ids, attention_mask=attention_mask, pixel_values=pixel_values).pooler_output
        return SequenceClassifierOutput(logits=self.rank_output(pooled))
