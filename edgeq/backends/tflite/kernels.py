"""List the TFLite kernels (operator, version, dtypes) that compute correctly in each runtime, and check files.

A runtime refuses some dtypes, aborts on others, and is silently wrong on a few: FULLY_CONNECTED from int8 to int16,
BATCH_MATMUL from int8 to int16, MUL from int16 to int8. A kernel outside the table was not tested, or failed. Two
kernels of the table have limits that the lowering works around: int16 RSQRT interpolates a table of every 128th
value, so roots of small values are wrong; int16 SOFTMAX counts every masked score as exp(-10).

Two more are read differently by different kernels unless the file leaves nothing open (`Operator.leaves_open`):
FULLY_CONNECTED of int16 reads its bias in the dtype that its options state from version 11 on, and in one that the
kernel chooses where they state none; BATCH_MATMUL of int8 has kernels that leave out the zero point of its right
operand, or both of them where the result is int32.

Source: one-operator models over the whole range of values, run in each kernel set of tests/kernel_sets.py by
tests/test_tflite_kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ai_edge_litert import schema_py_generated as schema

_NAMES = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_DTYPES = {number: name.lower() for name, number in vars(schema.TensorType).items() if not name.startswith("_")}

Dtypes = tuple[str, ...]  # of the data inputs (no shapes, no axes), then of the output


@dataclass(frozen=True)
class Operator:
    """Describe one operator of a .tflite file."""

    signature: str
    name: str
    version: int
    dtypes: Dtypes
    operands: tuple[str, ...]  # names of the data inputs
    output: str
    leaves_open: str | None = None  # what kernels of different runtimes may read differently


@dataclass(frozen=True)
class Contents:
    """Hold the operators of a .tflite file, and its tensors that are neither integers nor booleans."""

    operators: tuple[Operator, ...]
    float_tensors: tuple[str, ...]


_I8, _I16 = ("int8", "int8"), ("int16", "int16")
_BOTH = frozenset({_I8, _I16})
_PAIRS = frozenset({("int8", "int8", "int8"), ("int16", "int16", "int16")})
_WHOLE = frozenset({("int32", "int32", "int32")})
_NARROW_BIAS, _WIDE_BIAS = ("int16", "int8", "int32", "int16"), ("int16", "int8", "int64", "int16")

# operator -> version -> dtypes
LITERT: dict[str, dict[int, frozenset[Dtypes]]] = {
    "ADD": {1: _WHOLE, 2: _PAIRS},
    "AVERAGE_POOL_2D": {2: frozenset({_I8}), 3: frozenset({_I16})},
    "BATCH_MATMUL": {2: frozenset({("int8",) * 3, ("int8", "int8", "int32")}), 3: frozenset({("int16",) * 3})},
    "CAST": {
        1: frozenset({
            ("int32", "int8"), ("int32", "int16"), ("int8", "int16"), ("int8", "int32"), ("int16", "int32"),
        }),
    },
    "CONCATENATION": {2: frozenset({_I8}), 3: frozenset({_I16})},  # all operands have one dtype
    "CONV_2D": {3: frozenset({("int8", "int8", "int32", "int8")}), 4: frozenset({_WIDE_BIAS})},
    "DEPTHWISE_CONV_2D": {
        3: frozenset({("int8", "int8", "int32", "int8")}), 5: frozenset({("int16", "int8", "int16"), _WIDE_BIAS}),
    },
    "EXP": {2: frozenset({_I8})},
    "FILL": {1: _WHOLE},
    "FULLY_CONNECTED": {
        4: frozenset({("int16", "int8", "int16")}),
        5: frozenset({("int8", "int8", "int32", "int8"), ("int8", "int8", "int8")}),
        11: frozenset({_NARROW_BIAS, _WIDE_BIAS}),
    },
    "GATHER": {2: frozenset({("int8", "int32", "int8"), ("int16", "int32", "int16")})},
    "GELU": {2: _BOTH},
    "LOGISTIC": {3: frozenset({_I16})},
    "MEAN": {2: _BOTH},
    "MAXIMUM": {1: _WHOLE},
    "MINIMUM": {1: _WHOLE, 2: _PAIRS},
    "MAX_POOL_2D": {2: frozenset({_I8}), 3: frozenset({_I16})},
    "MUL": {1: _WHOLE, 2: _PAIRS},
    "PAD": {2: frozenset({_I8}), 4: frozenset({_I16})},
    "PADV2": {2: frozenset({("int8",) * 3}), 4: frozenset({("int16",) * 3})},
    "QUANTIZE": {1: frozenset({("int8", "int16"), ("int16", "int8"), _I16, _I8, ("uint8", "int8")})},
    "REDUCE_MAX": {2: frozenset({_I8, ("int32", "int32")}), 3: frozenset({_I16})},
    "RELU": {2: _BOTH},
    "RESHAPE": {1: _BOTH},
    "RIGHT_SHIFT": {1: _WHOLE},
    "RSQRT": {1: frozenset({_I16})},
    "SLICE": {4: _BOTH},
    "SOFTMAX": {2: frozenset({_I8}), 3: frozenset({_I16})},
    "SUB": {1: _WHOLE, 2: _PAIRS},
    "SUM": {1: frozenset({("int32", "int32")})},
    "TANH": {3: frozenset({_I16})},
    "TRANSPOSE": {2: _BOTH},
}  # fmt: skip

# Kernels that tflite-runtime 2.14 lacks or computes wrongly. Source: as above.
_NOT_IN_TFLITE_RUNTIME: dict[str, frozenset[Dtypes]] = {
    "FULLY_CONNECTED": frozenset({_NARROW_BIAS, _WIDE_BIAS}),
    "GELU": frozenset({_I16}),
    "QUANTIZE": frozenset({("int8", "int16")}),
    "RSQRT": frozenset({_I16}),
}
TFLITE_RUNTIME = {
    name: {version: dtypes - _NOT_IN_TFLITE_RUNTIME.get(name, frozenset()) for version, dtypes in versions.items()}
    for name, versions in LITERT.items()
}
TFLITE_RUNTIME["FULLY_CONNECTED"][4] |= {_NARROW_BIAS}  # it has no version 11, and its version 4 reads 32 bits

KERNELS = {"litert": LITERT, "tflite-runtime": TFLITE_RUNTIME}
_BIAS_STATED = 11
# Operators with inputs that are shapes, axes or widths -> the places of these among the inputs.
_SHAPES = {
    "MEAN": (1,), "PAD": (1,), "PADV2": (1,), "REDUCE_MAX": (1,), "RESHAPE": (1,), "SLICE": (1, 2), "SUM": (1,),
    "TRANSPOSE": (1,),
}  # fmt: skip


def operator_name(code: schema.OperatorCodeT) -> str:
    """Give the name of an operator code; for a custom operator the name in the file."""
    name = _NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)]
    return str(code.customCode.decode()) if name == "CUSTOM" and code.customCode else name


def read(data: bytes) -> Contents:
    """Read every operator and every float tensor of a .tflite file."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
    found = tuple(_described(model, graph, item) for graph in model.subgraphs for item in graph.operators)
    floats = tuple(
        f"{graph.name.decode()}: {tensor.name.decode()} ({_DTYPES[tensor.type]})"
        for graph in model.subgraphs
        for tensor in graph.tensors
        if not _DTYPES[tensor.type].startswith(("int", "uint", "bool"))
    )
    return Contents(found, floats)


def _described(model: schema.ModelT, graph: schema.SubGraphT, operator: schema.OperatorT) -> Operator:
    code = model.operatorCodes[operator.opcodeIndex]
    name = operator_name(code)
    operands = [index for place, index in enumerate(operator.inputs) if place not in _SHAPES.get(name, ())]
    tensors = [graph.tensors[index] for index in [*operands, *operator.outputs]]
    dtypes = tuple(_DTYPES[tensor.type] for tensor in tensors)
    *names, output = (tensor.name.decode() for tensor in tensors)
    left_open = _left_open(operator, name, code.version, tensors)
    if name == "CONCATENATION" and len(set(dtypes)) == 1:
        dtypes = dtypes[:2]  # however many operands there are
    return Operator(graph.name.decode(), name, code.version, dtypes, tuple(names), output, left_open)


def _left_open(operator: schema.OperatorT, name: str, version: int, tensors: Sequence[schema.TensorT]) -> str | None:
    """Say what an operator leaves to the kernel, of which kernels are known to choose differently."""
    dtypes = [_DTYPES[tensor.type] for tensor in tensors]
    if name == "FULLY_CONNECTED" and version >= _BIAS_STATED and len(dtypes) == 4:
        stated = operator.builtinOptions.quantizedBiasType
        return None if stated == tensors[2].type else f"its bias is {dtypes[2]}, its options state {_DTYPES[stated]}"
    if name == "BATCH_MATMUL" and dtypes[0] == "int8":
        read = {"left": tensors[0], "right": tensors[1]} if dtypes[2] == "int32" else {"right": tensors[1]}
        found = [side for side, tensor in read.items() if any(tensor.quantization.zeroPoint)]
        return f"the zero point of its {found[0]} operand is not 0" if found else None
    return None


def violations(contents: Contents, runtime: str) -> list[str]:
    """List the float tensors, and the operators outside the runtime's table of kernels; empty for a good file."""
    found = [f"{name}: a float tensor" for name in contents.float_tensors]
    for operator in contents.operators:
        unknown = unknown_kernel(operator, runtime)
        if unknown is not None:
            found.append(f"{operator.signature}: {operator.output}: {unknown}")
    return found


def unknown_kernel(operator: Operator, runtime: str) -> str | None:
    """Say which kernel an operator needs that is not known to be right in the runtime, or None."""
    if operator.dtypes in KERNELS[runtime].get(operator.name, {}).get(operator.version, frozenset()):
        if operator.leaves_open is None:
            return None
        return f"{operator.name} of {operator.dtypes[0]}: {operator.leaves_open}, which not every kernel reads alike"
    return (
        f"{operator.name} version {operator.version} from {' '.join(operator.dtypes[:-1])} to {operator.dtypes[-1]} is "
        f"not known to be right in {runtime}"
    )
