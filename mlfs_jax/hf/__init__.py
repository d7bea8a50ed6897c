"""Hugging Face checkpoints in and out: one small table per family, strict in both directions."""
