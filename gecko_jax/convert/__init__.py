"""Checkpoints of other libraries in, checkpoints for other libraries out."""
