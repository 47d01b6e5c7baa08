"""Cross-modal encoders: ``meter`` implements METER for transformers; ``convert`` reads the authors' checkpoints."""
