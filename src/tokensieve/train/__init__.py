"""Training recipes: the bundled models, and fine-tuning with token reduction."""
