"""Observe a float model on texts or images, and move scale between tensors and weights (SmoothQuant)."""
