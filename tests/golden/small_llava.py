"""A small LLaVA, whose vision encoder or LLM is the one that the authors' numbers come from."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tests.support.families import IMAGE, VOCABULARY


def llava_around(config, layers=1):
    """Return a LLaVA model with this CLIP encoder, a projector that changes nothing, and an LLM of so many layers."""
    width = config["hidden_size"]
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        pad_token_id=0,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**config),
            text_config=text,
            image_token_id=IMAGE,
            projector_hidden_act="linear",
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
        )
    ).eval()
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model
