"""Read which weight products are integer, from the CPU plugin's execution graph or from the IR."""

from __future__ import annotations

from collections import Counter
from typing import Any

from edgeq.backends.openvino.ir import Network
from edgeq.records import Placement, QdqModel

_PRODUCTS = frozenset(
    {"Convolution", "FullyConnected", "FullyConnectedQuantized", "FullyConnectedQuantizedLegacy", "MatMul"}
)
_EIGHT_BITS = frozenset({"u8", "i8"})
_TURNED = "/transpose_b"  # a suffix that the plugin adds to the name of stored weights


def executed(compiled: Any, model: QdqModel) -> Placement:
    """Read the placement from the execution graph of a compiled model.

    A product is integer when its kernel's name ends in `_i8` and its first input has 8 bits. `runtimePrecision` is no
    evidence: it is the weights' dtype, also for products that run in float.
    """
    integer: set[str] = set()
    kinds: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ordered_ops():
        facts = {key: str(operation.get_rt_info()[key].value) for key in ("layerType", "primitiveType")}
        if facts["layerType"] in ("Const", "Input", "Output"):
            continue
        kinds[facts["layerType"]] += 1
        if facts["layerType"] not in _PRODUCTS or not facts["primitiveType"].lower().endswith("_i8"):
            continue
        if operation.input(0).get_element_type().get_type_name() in _EIGHT_BITS:
            weights = operation.input_value(1).get_node()
            integer |= _names(operation) | {name.removesuffix(_TURNED) for name in _names(weights)}
    return _placement(integer, kinds, model)


def _names(operation: Any) -> set[str]:
    """Give the names of an operation's sources; a product fused with a scale loses its name, its weights do not."""
    return set(str(operation.get_rt_info()["originalLayersNames"].value).split(","))


def structural(network: Network, model: QdqModel) -> Placement:
    """Read the placement from an IR: a MatMul of two 8-bit tensors counts as integer."""
    integer = {layer.name for layer in network.of("MatMul") if network.is_integer_product(layer)}
    kinds = Counter(layer.operation for layer in network.layers.values())
    for kind in ("Const", "Parameter", "Result"):
        kinds.pop(kind, None)
    return _placement(integer, kinds, model)


def _placement(integer: set[str], kinds: Counter[str], model: QdqModel) -> Placement:
    return Placement(
        integer_matmuls=sum(name in integer for name in model.integer_matmuls),
        float_by_scheme=model.float_matmuls,
        float_fallbacks=tuple(name for name in model.integer_matmuls if name not in integer),
        operators=dict(sorted(kinds.items())),
    )
