"""Summarise a model file: operators by dtype, tensors by dtype, sizes."""
