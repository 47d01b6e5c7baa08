"""Qwen3.5: Qwen3-VL's vision encoder with an LLM in which most layers use linear attention."""

from tokensieve.models.qwen_vl import QwenVL


class Qwen35(QwenVL):
    name = "qwen3.5"
    title = "Qwen3.5"
    model_types = ("qwen3_5",)
    stages = ("connector",)
    decoder_unsupported = "most layers of its LLM use linear attention, whose state has no tokens to drop"
