"""The configuration of METER."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig, RobertaConfig


class MeterConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is untyped
    """METER: a CLIP vision encoder, a RoBERTa, and pairs of co-attention layers on top.

    The defaults are METER-CLIP16-RoBERTa at 384 px.

    Attributes:
        text_config, vision_config: the text and vision encoders (RoBERTa and CLIP without CLIP's last layer).
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps: settings of
            the co-attention layers, which come in pairs.
        hidden_dropout_prob, attention_probs_dropout_prob: dropout of these layers.
        modality_type_vocab_size: 2, or 3 if the second image has a type of its own (NLVR2).
        own_key_visible: query i attends to key i in each co-attention layer even if the key is padding, also across
            streams. PuMer's fine-tuned checkpoints were trained so.
    """

    model_type = "meter"
    sub_configs = {"text_config": RobertaConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012

    text_config: dict[str, Any] | RobertaConfig | None = None
    vision_config: dict[str, Any] | CLIPVisionConfig | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    modality_type_vocab_size: int = 2
    own_key_visible: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        text, vision = self.text_config, self.vision_config
        if not isinstance(text, RobertaConfig):
            self.text_config = RobertaConfig(**(text or ROBERTA_BASE))
        if not isinstance(vision, CLIPVisionConfig):
            self.vision_config = CLIPVisionConfig(**(vision or CLIP_16))
        super().__post_init__(**kwargs)


ROBERTA_BASE = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
CLIP_16 = {"image_size": 384, "patch_size": 16, "num_hidden_layers": 11}
