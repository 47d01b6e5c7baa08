"""The model families that the plug-in serves, as declarations. Each says what vLLM's class of the family does not.

A declaration is read in two places. The frontend asks for the layout of an image's tokens before anything is encoded,
and the worker maps what it reads in the vision encoder to these tokens. No file here imports vLLM or torch at its head.
"""

from __future__ import annotations

from tokensieve.vllm.families.base import ServedFamily
from tokensieve.vllm.families.idefics3 import Idefics3, SmolVLM
from tokensieve.vllm.families.internvl import InternVL
from tokensieve.vllm.families.llava import Llava
from tokensieve.vllm.families.llava_next import LlavaNext, LlavaOnevision
from tokensieve.vllm.families.pixtral import Mistral3, Pixtral
from tokensieve.vllm.families.qwen_vl import Qwen2VL, Qwen3VL, Qwen3VLMoe, Qwen25VL

__all__ = ["FAMILIES", "REFUSED", "ServedFamily"]

FAMILIES: tuple[ServedFamily, ...] = (
    Llava(),
    LlavaNext(),
    LlavaOnevision(),
    Pixtral(),
    Mistral3(),
    InternVL(),
    Idefics3(),
    SmolVLM(),
    Qwen2VL(),
    Qwen25VL(),
    Qwen3VL(),
    Qwen3VLMoe(),
)

REFUSED: dict[str, str] = {
    "gemma3": (
        "the tokens of an image attend to each other in both directions, which vLLM's attention on a CPU does not do: "
        "its answers differ from transformers' even with all tokens; on other devices nothing is checked"
    ),
}
"""Model types that cannot be served, and why."""
