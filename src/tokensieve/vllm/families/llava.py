"""LLaVA-1.5 with a CLIP or SigLIP tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokensieve.vllm.families.base import ServedFamily


class Llava(ServedFamily):
    title = "LLaVA-1.5"
    model_types = ("llava",)
    module, architecture = "llava", "LlavaForConditionalGeneration"

    def describes(self, config: Mapping[str, Any]) -> bool:
        return super().describes(config) and config["vision_config"].get("model_type") in (
            "clip_vision_model",
            "siglip_vision_model",
        )

    def built(self, config: Mapping[str, Any]) -> int:
        layers, states = config.get("vision_feature_layer", -2), self.depth(config) + 1
        indices = [layers] if isinstance(layers, int) else layers  # of hidden states: 0 enters the first layer
        return max(index % states for index in indices)

    def weights_mapper(self) -> Any | None:
        from vllm.model_executor.models.utils import WeightsMapper

        # transformers 5.2x saves CLIP without "vision_model."
        parts = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
        return WeightsMapper(
            orig_to_new_prefix={
                f"{prefix}vision_tower.{part}": f"vision_tower.vision_model.{part}"
                for part in parts
                for prefix in ("", "model.")
            }
        )
