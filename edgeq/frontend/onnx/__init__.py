"""Convert an ONNX file that the user exported to the dialect's opset and interface, without torch."""
