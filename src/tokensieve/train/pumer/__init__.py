"""Fine-tune a cross-modal encoder with PuMer attached, on the Hugging Face Trainer.

``tasks.py`` has the tasks and their losses, ``data.py`` records and batches, ``models.py`` student and teacher,
``recipe.py`` the settings and the Trainer. ``run.py`` runs a training.
"""

from tokensieve.train.pumer.recipe import Recipe
from tokensieve.train.pumer.run import train_pumer

__all__ = ["Recipe", "train_pumer"]
