"""Take an ONNX file that someone else exported: find it, bring it to the dialect's opset and interface, prove it.

    finding         the file, its tokenizer, its configuration; what identifies it
    reading         load, check, FP32 weights, the dialect's opset; exact but for half-precision arithmetic
    fused_operators operators that ONNX Runtime's optimiser writes, taken apart
    interface       inputs by their names, vectors out of hidden states
    heads           pooling, Dense and normalisation, as graph and in numpy
    reference       the file as it was given, run in ONNX Runtime
    configuration   what goes into a bundle beside the graph

Nothing here needs torch.
"""

from edgeq.onnx_source.finding import OnnxFile, OnnxOptions, find

__all__ = ["OnnxFile", "OnnxOptions", "find"]
