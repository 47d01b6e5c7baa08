"""Train the net of a method beside a frozen model.

``recipe.py`` has the settings, ``answers.py`` trains by the loss of the answers on Hugging Face's Trainer, ``exits.py``
trains gates on features that are collected once, ``twig.py`` trains blocks beside the LLM, ``score.py`` measures on
held-out questions, and ``run.py`` runs a training.
"""

from tokensieve.train.method.recipe import Recipe
from tokensieve.train.method.run import train_method

__all__ = ["Recipe", "train_method"]
