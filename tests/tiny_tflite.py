"""A .tflite file with a signature for each length: rows of a table, those that the mask keeps averaged, one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

VOCABULARY, DIM = 64, 24
SCALES = {"table": 0.02, "keep": 1.0 / 127.0, "word": 0.02, "kept": 0.02, "mean": 0.005, "sentence_embedding": 0.01}


def make_tflite(lengths: Sequence[int], seed: int = 0, output: str = "sentence_embedding") -> bytes:
    """Give the file's bytes; weights lie in it once, whatever the number of signatures."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    kinds, options = schema.BuiltinOperator, schema.BuiltinOptions
    random = np.random.default_rng(seed)
    weights = SCALES["sentence_embedding"] / SCALES["mean"] / 600.0 * (1.0 + np.arange(DIM) / DIM)
    constants = {
        "table": (random.integers(-127, 128, (VOCABULARY, DIM)).astype(np.int8), SCALES["table"]),
        "keep": (np.array([[0], [127]], np.int8), SCALES["keep"]),
        "weight": (random.integers(-127, 128, (DIM, DIM)).astype(np.int8), weights),
        "bias": (random.integers(-300, 300, DIM).astype(np.int32), weights * SCALES["mean"]),
        "axis": (np.array([1], np.int32), None),
    }
    model = schema.ModelT()
    model.version, model.description, model.buffers = 3, b"tiny", [schema.BufferT()]
    for array, _ in constants.values():
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(array.tobytes(), np.uint8)
        model.buffers.append(buffer)
    model.operatorCodes = []
    for kind, version in ((kinds.GATHER, 2), (kinds.MUL, 2), (kinds.MEAN, 2), (kinds.FULLY_CONNECTED, 5)):
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = kind
        code.version = version
        model.operatorCodes.append(code)
    gather, product, mean, linear = range(4)

    def tensor(graph: Any, name: str, shape: Sequence[int], dtype: type, scale: Any = None, buffer: int = 0) -> int:
        made = schema.TensorT()
        types = {np.int8: schema.TensorType.INT8, np.int32: schema.TensorType.INT32}
        made.name, made.shape, made.type, made.buffer = name.encode(), np.array(shape, np.int32), types[dtype], buffer
        if scale is not None:
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale = np.atleast_1d(np.asarray(scale, np.float32))
            made.quantization.zeroPoint = np.zeros(np.size(scale), np.int64)
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    def apply(graph: Any, code: int, inputs: Sequence[int], out: int, kind: int, settings: Any) -> None:
        made = schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = code, np.array(inputs, np.int32), np.array([out], np.int32)
        made.builtinOptionsType, made.builtinOptions = kind, settings
        graph.operators.append(made)

    def named(name: str, position: int) -> Any:
        made = schema.TensorMapT()
        made.name, made.tensorIndex = name.encode(), position
        return made

    model.subgraphs, model.signatureDefs = [], []
    for number, length in enumerate(lengths):
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = f"seq_{length}".encode(), [], []
        inputs = [tensor(graph, name, (1, length), np.int32) for name in ("input_ids", "attention_mask")]
        held = {
            name: tensor(graph, name, array.shape, array.dtype.type, scale, place)
            for place, (name, (array, scale)) in enumerate(constants.items(), start=1)
        }
        word = tensor(graph, "word", (1, length, DIM), np.int8, SCALES["word"])
        keep = tensor(graph, "kept_or_not", (1, length, 1), np.int8, SCALES["keep"])
        kept = tensor(graph, "kept", (1, length, DIM), np.int8, SCALES["kept"])
        average = tensor(graph, "mean", (1, DIM), np.int8, SCALES["mean"])
        vector = tensor(graph, output, (1, DIM), np.int8, SCALES["sentence_embedding"])
        for source, chosen, out in (("table", inputs[0], word), ("keep", inputs[1], keep)):
            apply(graph, gather, [held[source], chosen], out, options.GatherOptions, schema.GatherOptionsT())
        apply(graph, product, [word, keep], kept, options.MulOptions, schema.MulOptionsT())
        apply(graph, mean, [kept, held["axis"]], average, options.ReducerOptions, schema.ReducerOptionsT())
        operands = [average, held["weight"], held["bias"]]
        apply(graph, linear, operands, vector, options.FullyConnectedOptions, schema.FullyConnectedOptionsT())
        graph.inputs, graph.outputs = np.array(inputs, np.int32), np.array([vector], np.int32)
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = f"seq_{length}".encode(), number
        signature.inputs = [named("input_ids", inputs[0]), named("attention_mask", inputs[1])]
        signature.outputs = [named(output, vector)]
        model.subgraphs.append(graph)
        model.signatureDefs.append(signature)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
