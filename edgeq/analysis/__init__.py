"""Say where a target loses quality, what raises it, and what a model file holds."""
