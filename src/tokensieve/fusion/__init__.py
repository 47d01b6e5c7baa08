"""Cross-modal encoders: ``meter`` is a METER for transformers; ``convert`` reads the authors' checkpoints."""
