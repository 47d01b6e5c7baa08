"""Fine-tune a vision-language model while a method drops its tokens, on Hugging Face's Trainer and PEFT.

``recipe.py`` has the settings, ``schedule.py`` the methods by step, ``parts.py`` the tuned weights, ``data.py`` the
records and batches, ``loss.py`` the answers' loss, ``shared.py`` prompts that share their beginning, and ``run.py`` a
training.
"""

from tokensieve.train.adapter.recipe import Recipe
from tokensieve.train.adapter.run import train_adapter

__all__ = ["Recipe", "train_adapter"]
