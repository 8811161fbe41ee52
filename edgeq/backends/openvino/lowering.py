"""Turn a QDQ ONNX file into an OpenVINO IR whose bytes depend on nothing but the model and OpenVINO's version."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeq.errors import EdgeqError, LoweringFailed

STEM = "openvino/openvino_model"  # the name sentence-transformers opens by itself
BUCKET = "_seq_{}"

# Read by the CPU plugin when it compiles: without it OpenVINO may quantise activations again by groups, at run time.
# Source: OpenVINO 2026.4, src/plugins/intel_cpu, Config::applyRtInfo.
_IN_THE_FILE = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


@contextmanager
def refusals(what: str, kind: type[EdgeqError], advice: str) -> Iterator[None]:
    """Turn what OpenVINO raises (RuntimeError and its children, ValueError) into one of our errors."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        raise kind(f"{what}: OpenVINO refuses it: {_reason(error)}. {advice}") from error


def read_qdq(path: Path) -> Any:
    """Read a QDQ ONNX file as an OpenVINO model with names that do not depend on what was read before.

    Raises:
        LoweringFailed: OpenVINO lacks one of its operators, which the message names, or refuses it otherwise.
    """
    import openvino as ov

    with refusals(path.name, LoweringFailed, "Report the model, with what `edgeq inspect` says about the file."):
        model = ov.Core().read_model(path)
    _name(model)
    for key, value in _IN_THE_FILE.items():
        model.set_rt_info(value, ["runtime_options", key])
    return model


def _name(model: Any) -> None:
    """Give every operation without a name of its own one that counts from the graph's start.

    OpenVINO counts from the start of the process, so that the file would depend on what was read before it.
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
    """Give a copy that takes one text of so many tokens.

    Raises:
        LoweringFailed: a tensor keeps a dimension that is not fixed.
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

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def _reason(error: Exception) -> str:
    """Give OpenVINO's own sentence without the places in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Exception from", "Check '", "While validating"))]
    return " ".join(told or lines)[:600].rstrip(".") or type(error).__name__
