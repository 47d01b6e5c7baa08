"""Fine-tuning a cross-modal encoder with PuMer's reducers on, on the Hugging Face Trainer.

``tasks.py``: what a task asks, and with which loss. ``data.py``: records and batches. ``models.py``: student and
teacher. ``recipe.py``: the settings, and the Trainer with groups of learning rates. ``run.py``: all of it together.
"""

from tokensieve.train.pumer.recipe import Recipe
from tokensieve.train.pumer.run import train_pumer

__all__ = ["Recipe", "train_pumer"]
