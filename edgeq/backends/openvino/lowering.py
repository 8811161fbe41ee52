"""Convert a QDQ ONNX file to an OpenVINO IR; its bytes depend only on the model and OpenVINO's version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.backends.openvino.pad_keys import pad_keys
from edgeq.errors import EdgeqError, LoweringFailed
from edgeq.system.files import work_dir

STEM = "openvino/openvino_model"  # sentence-transformers opens this name
BUCKET = "_seq_{}"

# The CPU plugin reads it when it compiles; without it OpenVINO may quantise activations again in groups at run time.
# Source: OpenVINO 2026.4, src/plugins/intel_cpu, Config::applyRtInfo.
_IN_THE_FILE = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@contextmanager
def refusals(what: str, kind: type[EdgeqError], advice: str) -> Iterator[None]:
    """Turn OpenVINO's exceptions (RuntimeError and subclasses, ValueError, TypeError) into an edgeq error."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        raise kind(f"{what}: OpenVINO refuses it: {_reason(error)}. {advice}") from error


def read_qdq(path: Path, has_dynamic_keys: bool = False) -> Any:
    """Read a QDQ ONNX file as an OpenVINO model, with names that do not depend on models read before.

    Args:
        path: of the file.
        has_dynamic_keys: whether texts of any length run in it: then attention is padded inside, see `pad_keys`.

    Raises:
        LoweringFailed: OpenVINO lacks one of its operators, which the message names, or refuses it otherwise.
    """
    import openvino as ov

    with refusals(path.name, LoweringFailed, "Report the model, with what `edgeq inspect` says about the file."):
        model = ov.Core().read_model(path)
    turn_keys_inside(model)
    if has_dynamic_keys:
        pad_keys(model)
    _name(model)
    for key, value in _IN_THE_FILE.items():
        model.set_rt_info(value, ["runtime_options", key])
    return model


def compiling_error(path: Path) -> str | None:
    """Compile an ONNX file for the CPU, and give OpenVINO's reason why it cannot, or None."""
    import openvino as ov

    core = ov.Core()
    try:
        with refusals(path.name, LoweringFailed, "Take ONNX Runtime, or write that part with other operators."):
            core.compile_model(core.read_model(path), "CPU")
    except LoweringFailed as error:
        return str(error)
    return None


def turn_keys_inside(model: Any) -> int:
    """Replace the keys' Transpose [0, 2, 3, 1] by [0, 2, 1, 3] and transpose_b; give the number of MatMuls changed.

    Before::

        queries ─ MatMul(Transpose[0, 2, 3, 1](keys))

    After::

        queries ─ MatMul(Transpose[0, 2, 1, 3](keys), transpose_b)

    The sums are the same. The CPU plugin fuses the second Transpose into its attention kernel; the first costs a pass
    over the keys.
    """
    from openvino import opset1

    changed = 0
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul" or product.get_attributes()["transpose_b"]:
            continue
        transpose = product.input_value(1).get_node()
        if transpose.get_type_name() != "Transpose" or _order(transpose) != [0, 2, 3, 1]:
            continue
        keys = opset1.transpose(transpose.input_value(0), opset1.constant(np.array([0, 2, 1, 3])))
        keys.set_friendly_name(transpose.get_friendly_name())
        is_turned = bool(product.get_attributes()["transpose_a"])
        turned = opset1.matmul(product.input_value(0), keys, is_turned, True)
        turned.set_friendly_name(product.get_friendly_name())
        turned.output(0).set_names(product.output(0).get_names())
        for reader in product.output(0).get_target_inputs():
            reader.replace_source_output(turned.output(0))
        changed += 1
    model.validate_nodes_and_infer_types()
    return changed


def _order(transpose: Any) -> list[int] | None:
    order = transpose.input_value(1).get_node()
    return [int(axis) for axis in order.data] if order.get_type_name() == "Constant" else None


def _name(model: Any) -> None:
    """Number the operations without a name from the start of the graph.

    OpenVINO numbers them from the start of the process, so the file would depend on models read before.
    """
    operations = model.get_ordered_ops()
    taken = {item.get_friendly_name() for item in operations if item.get_friendly_name() != item.get_name()}
    number = 0
    for operation in operations:
        if operation.get_friendly_name() != operation.get_name():
            continue
        name = f"{operation.get_type_name()}_{number}"
        while name in taken:
            number += 1
            name = f"{operation.get_type_name()}_{number}"
        operation.set_friendly_name(name)
        number += 1
    model.set_friendly_name("sentence_embedding")


def static(model: Any, tokens: int) -> Any:
    """Give a copy with static shapes, for one text of so many tokens.

    Raises:
        LoweringFailed: a tensor keeps a dynamic dimension.
    """
    copy = model.clone()
    with refusals(f"{tokens} tokens", LoweringFailed, "Report the model."):
        copy.reshape({port.get_any_name(): [1, tokens] for port in copy.inputs})
    loose = [
        operation.get_friendly_name()
        for operation in copy.get_ordered_ops()
        if any(output.get_partial_shape().is_dynamic for output in operation.outputs())
    ]
    if loose:
        raise LoweringFailed(
            f"{tokens} tokens: {len(loose)} tensors keep a dynamic shape ({', '.join(loose[:5])}); an NPU needs static "
            "ones. Report the model."
        )
    return copy


def serialized(model: Any) -> tuple[bytes, bytes]:
    """Give the bytes of the .xml and of the .bin; weights keep their precision."""
    import openvino as ov

    with work_dir() as folder:
        path = folder / "model.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def _reason(error: Exception) -> str:
    """Give OpenVINO's error message without positions in its source code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lacking = [line.removeprefix("-- ") for line in lines if "No conversion rule found" in line]
    told = lacking or [line for line in lines if not line.startswith(("Exception from", "Check '", "While validating"))]
    return " ".join(told or lines)[:600].rstrip(".") or type(error).__name__
