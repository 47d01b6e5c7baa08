"""Recipes: how the bundled model was trained, and fine-tuning with token reduction on."""
