"""Turn what the user names (a model, an ONNX file, a torch module) into a float model."""
