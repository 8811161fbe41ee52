"""Export models of torch, transformers and sentence-transformers to raw ONNX; all that needs torch is here."""
