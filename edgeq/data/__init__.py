"""Texts and images: read, split, tokenise or resize them, and batch them for a model."""
