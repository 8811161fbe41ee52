"""Read an ONNX file that a user gives, and say in one sentence what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from edgeq.errors import ConfigError


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without its external data, and refuse one that is damaged.

    Raises:
        ConfigError: the bytes are not an ONNX model, or the model breaks ONNX's own rules.
    """
    advice = "Export it again, or check that the download is complete."
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ConfigError(f"{path}: not a readable ONNX file ({error}); a whole model is needed. {advice}") from error
    if not model.ir_version or not model.graph.node:
        found = "an empty file" if not path.stat().st_size else "no graph"
        raise ConfigError(f"{path}: {found} where an ONNX model is needed. {advice}")
    try:
        # By path: a model with external data is checked beside it, and one over 2 GB does not fit into one message.
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{path}: breaks ONNX's rules ({reason}). {advice}") from error
    return model
