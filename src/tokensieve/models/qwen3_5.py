"""Qwen3.5: Qwen3-VL's tower before an LLM of which most blocks attend linearly."""

from tokensieve.models.qwen_vl import QwenVL


class Qwen35(QwenVL):
    name = "qwen3.5"
    title = "Qwen3.5"
    model_types = ("qwen3_5",)
    stages = ("connector",)
    excluded = "most of its LLM's blocks attend linearly, and keep no tokens that could leave"
