"""Take an ONNX file that someone else exported: bring it to the dialect's opset and interface, without torch."""
