"""Convert a model directory, an ONNX file or a torch module to a float model."""
