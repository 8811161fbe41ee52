"""Take a model file apart: operators by dtype, tensors by dtype, sizes."""
