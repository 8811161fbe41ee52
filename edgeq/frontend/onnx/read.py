"""Read an ONNX file, and convert it to FP32 and to the dialect's opset."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import TensorProto, defs
from onnx_ir.passes.common import (
    IdentityEliminationPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    RemoveInitializersFromInputsPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from edgeq.errors import ConfigError, ToolMissing, Unsupported
from edgeq.graph import external_data
from edgeq.graph.dialect import OPSET
from edgeq.system.untrusted import require_confined

_OLDEST_OPSET = 11
CONTRIB = "com.microsoft"  # the domain of operators that only ONNX Runtime has
_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)

_SMALL_BYTES = 1 << 10
_LARGEST_FOLDED = 1 << 31
_QUANTISED = ("QuantizeLinear", "DequantizeLinear", "MatMulInteger", "ConvInteger")


def external_files(path: Path) -> tuple[str, ...]:
    """Name the files beside an ONNX file that hold its weights.

    Raises:
        ConfigError: `path` is no ONNX file, or refers to files outside of its folder.
    """
    graph = _parsed(path).graph
    require_confined(path)
    names = {
        entry.value
        for tensor in graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(sorted(names))


def _parsed(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ConfigError(f"{path}: not an ONNX file, or cut off ({error}); fetch or export it again") from error
    if not model.graph.node or not model.opset_import:
        raise ConfigError(f"{path}: an ONNX file without nodes or opset; fetch or export it again")
    return model


def read(path: Path) -> ir.Model:
    """Read a file with its external data; inline functions and turn constants into initializers.

    Raises:
        ConfigError: `path` is no ONNX file, or its external data is missing or outside of its folder.
        Unsupported: the model is quantised already, or its opset is too old to be converted.
    """
    proto = _parsed(path)
    for name in external_files(path):
        if not (path.parent / name).is_file():
            raise ConfigError(f"{path}: its weights lie in {name}, which is not beside it; put the file there")
    _refuse_quantised(proto, path)
    proto = external_data.load(path)
    version = opset(proto)
    if version < _OLDEST_OPSET:
        raise Unsupported(
            f"{path}: opset {version}; {_OLDEST_OPSET} or newer is needed, for every backend. "
            f"Export the model again with opset 17 to {OPSET}: torch.onnx.export(..., opset_version=17)."
        )
    model = ir.from_proto(proto)
    for rewrite in (
        InlinePass(), RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        RemoveInitializersFromInputsPass(), IdentityEliminationPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0), RemoveUnusedNodesPass(),
        RemoveUnusedOpsetsPass(),
    ):  # fmt: skip
        rewrite(model)
    return model


def opset(model: onnx.ModelProto) -> int:
    """Give the opset version of the default domain, or 0."""
    return max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)


def _refuse_quantised(model: onnx.ModelProto, path: Path) -> None:
    found = {
        node.op_type for node in model.graph.node
        if node.op_type in _QUANTISED or node.op_type.startswith(("QLinear", "DynamicQuantize", "QAttention", "QGemm"))
        or node.op_type in ("MatMulNBits", "QEmbedLayerNormalization")
    }  # fmt: skip
    if found:
        raise Unsupported(
            f"{path}: holds {', '.join(sorted(found))}: it is quantised already, and calibration needs the floats. "
            "Give the FP32 or FP16 file that it was made from."
        )


def is_narrow(model: ir.Model) -> bool:
    """Tell whether a value of the graph is FP16, BF16 or FP64."""
    return any(value.dtype in _NARROW for value in _values(model))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.initializers.values()
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def widen(model: ir.Model) -> None:
    """Convert FP16, BF16 and FP64 weights and arithmetic to FP32, with the same values of the weights."""
    for value in _values(model):
        if value.const_value is not None and value.const_value.dtype in _NARROW:
            value.const_value = external_data.tensor_of(value.const_value.numpy().astype(np.float32), str(value.name))
        if value.dtype in _NARROW:
            value.dtype = ir.DataType.FLOAT
    for node in model.graph:
        for name, attribute in tuple(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in _NARROW:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy().astype("float32")))
            is_type = name == "to" or name == "dtype"
            if is_type and attribute.type == ir.AttributeType.INT and ir.DataType(attribute.value) in _NARROW:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    for output in model.graph.outputs:
        if output.dtype in _NARROW:
            output.dtype = ir.DataType.FLOAT


def convert_opset(model: ir.Model, name: str) -> ir.Model:
    """Convert to the dialect's opset with onnx's version converter, which leaves operators of other domains alone.

    Args:
        model: as `read` gives it.
        name: for messages.

    Raises:
        Unsupported: the converter fails.
    """
    large = {
        key: value.const_value for key, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes > _SMALL_BYTES
    }  # fmt: skip
    for key, tensor in large.items():  # the converter copies weights, so they become inputs for it
        value = model.graph.initializers.pop(key)
        value.const_value, value.shape, value.dtype = None, ir.Shape(tensor.numpy().shape), tensor.dtype
        model.graph.inputs.append(value)
    model = ir.from_proto(_inferred(ir.to_proto(model)))  # some of the converter's adapters read shapes
    for node in model.graph:
        if _is_kept_from_converter(node, model.graph.opset_imports.get("", OPSET)):
            node.domain = CONTRIB
    version = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 0))
    proto = ir.to_proto(model)
    if version != OPSET:
        try:
            proto = onnx.version_converter.convert_version(proto, OPSET)
        except Exception as error:  # the boundary to onnx's converter, which raises RuntimeError and its own
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise Unsupported(
                f"{name}: onnx cannot convert it from opset {version} to {OPSET}: {reason}. "
                f"Export the model again with opset 17 to {OPSET}."
            ) from error
    proto.ir_version = min(max(proto.ir_version, 10), 10)
    converted = ir.from_proto(proto)
    for key, tensor in large.items():
        value = next(item for item in converted.graph.inputs if item.name == key)
        converted.graph.inputs.remove(value)
        value.const_value = tensor
        converted.graph.register_initializer(value)
    for node in converted.graph:
        if node.domain == CONTRIB and node.op_type in _RETURNED_TO_STANDARD:
            node.domain = ""
    return converted


_RETURNED_TO_STANDARD = ("LayerNormalization",)


def _is_kept_from_converter(node: ir.Node, version: int) -> bool:
    """Tell whether a node of the default domain is no operator of its opset, and would make the converter fail.

    ONNX Runtime writes such nodes, for one LayerNormalization before opset 17.
    """
    if node.domain not in ("", "ai.onnx"):
        return False
    try:
        return defs.get_schema(node.op_type, version, "").deprecated
    except defs.SchemaError:
        return True


def _inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Infer the shapes of standard operators again."""
    del proto.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def fold(model: ir.Model, name: str) -> ir.Model:
    """Fold values that depend on constants and known dimensions alone, with onnxscript.

    Raises:
        ToolMissing: onnxscript is not installed.
        Unsupported: onnxscript fails on the graph.
    """
    try:
        from onnxscript import optimizer
    except ImportError as error:
        raise ToolMissing(f"an ONNX file needs onnxscript ({error}); install: pip install 'edgeq[onnx]'") from error
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        # Not `optimize`: its rules treat an epsilon of 1e-12 as zero.
        optimizer.fold_constants(
            model, onnx_shape_inference=True, input_size_limit=_LARGEST_FOLDED, output_size_limit=_LARGEST_FOLDED
        )
    except Exception as error:  # the boundary to onnxscript, which may raise anything
        raise Unsupported(
            f"{name}: onnxscript cannot fold its constants ({type(error).__name__}: {error}); "
            "export the model again with another opset or exporter"
        ) from error
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    RemoveUnusedNodesPass()(model)
    return model
