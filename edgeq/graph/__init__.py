"""Read and edit ONNX graphs: the dialect, constants, producers, weights in files, FP32 sessions."""
