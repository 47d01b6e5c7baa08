"""Fine-tune a vision-language model while a method drops its tokens, on Hugging Face's Trainer and PEFT.

``recipe.py`` has the settings, ``schedule.py`` the methods by step, ``parts.py`` what is tuned, ``data.py`` records and
batches, ``loss.py`` the answers' loss, and ``run.py`` a training.
"""

from tokensieve.train.adapter.recipe import Recipe
from tokensieve.train.adapter.run import train_adapter

__all__ = ["Recipe", "train_adapter"]
