"""METER: CLIP and RoBERTa, then pairs of co-attention layers (Dou et al., "An Empirical Study of Training End-to-End
Vision-and-Language Transformers", 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import CLIPVisionModel, PreTrainedModel, RobertaModel
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput

from tokensieve.fusion.meter.configuration import MeterConfig
from tokensieve.ops import mask_bias


@dataclass
class MeterModelOutput(ModelOutput):  # type: ignore[misc]
    """Both streams after the last pair, `[B, T, D]` and `[B, I, D]`, and their pooled first tokens, `[B, 2D]`."""

    text_features: Tensor | None = None
    image_features: Tensor | None = None
    pooler_output: Tensor | None = None


class MeterHeads(nn.Module):
    """Multi-head attention from ``hidden_states`` to ``context``."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        rows = (self.query(hidden_states), self.key(context), self.value(context))
        query, key, value = (r.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for r in rows)
        dropout = self.dropout.p if self.training else 0.0
        mixed: Tensor = scaled_dot_product_attention(query, key, value, bias, dropout)
        return mixed.transpose(1, 2).flatten(2)


class MeterResidual(nn.Module):
    """Project, add the residual, and normalise."""

    def __init__(self, config: MeterConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        out: Tensor = self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)
        return out


class MeterAttention(nn.Module):
    """Attention with its residual connection; ``context`` is the other stream in cross-attention."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.self = MeterHeads(config)
        self.output = MeterResidual(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, context: Tensor, bias: Tensor | None) -> tuple[Tensor]:
        return (self.output(self.self(hidden_states, context, bias), hidden_states),)


class MeterIntermediate(nn.Module):
    """The first half of the MLP."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.act(self.dense(hidden_states))
        return out


class MeterCoAttentionLayer(nn.Module):
    """Self-attention, attention to the other stream, MLP."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.attention = MeterAttention(config)
        self.crossattention = MeterAttention(config)
        self.intermediate = MeterIntermediate(config)
        self.output = MeterResidual(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        (rows,) = self.attention(hidden_states, hidden_states, attention_mask)
        (rows,) = self.crossattention(rows, encoder_hidden_states, encoder_attention_mask)
        out: Tensor = self.output(self.intermediate(rows), rows)
        return out


class MeterPooler(nn.Module):
    """Project the first token."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class MeterPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    config_class = MeterConfig
    base_model_prefix = "meter"
    input_modalities = ("image", "text")
    _supports_sdpa = True


class MeterModel(MeterPreTrainedModel):
    """Both encoders and the co-attention layers, without a head."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        vision: Any = config.vision_config
        width = config.hidden_size
        self.text_model = RobertaModel(text, add_pooling_layer=False)
        self.vision_model = CLIPVisionModel(vision)
        self.cross_modal_text_transform = nn.Linear(text.hidden_size, width)
        self.cross_modal_image_transform = nn.Linear(vision.hidden_size, width)
        self.token_type_embeddings = nn.Embedding(config.modality_type_vocab_size, width)
        depth = range(config.num_hidden_layers)
        self.cross_modal_text_layers = nn.ModuleList(MeterCoAttentionLayer(config) for _ in depth)
        self.cross_modal_image_layers = nn.ModuleList(MeterCoAttentionLayer(config) for _ in depth)
        self.cross_modal_text_pooler = MeterPooler(config)
        self.cross_modal_image_pooler = MeterPooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.text_model.get_input_embeddings()
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_token_type_idx: int = 1,
        **kwargs: Any,
    ) -> MeterModelOutput:
        """Encode texts `[B, T]` with a mask that is 0 on padding, and images `[B, 3, height, width]`."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kinds = self.token_type_embeddings.weight
        text_rows = self.text_model(input_ids, attention_mask=mask).last_hidden_state
        patches = self.vision_model(pixel_values).last_hidden_state
        text = self.cross_modal_text_transform(text_rows) + kinds[0]
        image = self.cross_modal_image_transform(self._post_norm()(patches)) + kinds[image_token_type_idx]
        # text keys are masked for queries of both streams; images have no padding
        visible = self.config.own_key_visible
        to_text, from_image = (mask_bias(mask, text.dtype, visible * rows.shape[1]) for rows in (text, image))
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            text = text_layer(text, image, attention_mask=to_text)
            image = image_layer(image, text, encoder_attention_mask=from_image)
        pooled = torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], -1)
        return MeterModelOutput(text_features=text, image_features=image, pooler_output=pooled)

    def _post_norm(self) -> nn.Module:
        norm: nn.Module = getattr(self.vision_model, "vision_model", self.vision_model).post_layernorm
        return norm
