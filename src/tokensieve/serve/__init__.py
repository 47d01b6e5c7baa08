"""An OpenAI-compatible server with a method attached, on vLLM or on transformers, behind one guard."""

from tokensieve.serve.settings import Limits, Settings

__all__ = ["Limits", "Settings"]
