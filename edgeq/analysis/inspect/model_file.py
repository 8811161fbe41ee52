"""Summarise an ONNX file, an OpenVINO IR, a .tflite file or a bundle: operators by dtype, tensors by dtype, sizes."""

from __future__ import annotations

from pathlib import Path

from edgeq.analysis.inspect import onnx, openvino, tflite
from edgeq.analysis.inspect.summary import ModelSummary, Port, Signature, StoredTensor, TensorGroup
from edgeq.errors import BundleCorrupt, ConfigError
from edgeq.graph.read import read_onnx

__all__ = ["ModelSummary", "Port", "Signature", "StoredTensor", "TensorGroup", "inspect", "read_onnx"]


def inspect(path: Path) -> ModelSummary:
    """Summarise a model file, or a bundle's artifact.

    Raises:
        ConfigError: the path does not exist, or is neither a readable model file nor a bundle with one.
        BundleCorrupt: the manifest cannot be read, or names an artifact that does not exist.
        ToolMissing: it is a .tflite file, and ai-edge-litert, which reads it, is not installed.
    """
    if path.is_dir():
        model_path = _artifact_of(path)
        found = sorted(file for file in path.rglob("*") if file.is_file())
        bundle_files = {file.relative_to(path).as_posix(): file.stat().st_size for file in found}
        name = model_path.relative_to(path).as_posix()
    elif path.is_file():
        model_path, bundle_files, name = path, {}, path.name
    else:
        raise ConfigError(f"{path}: nothing is there; a model file or a bundle is needed. Check the path.")
    if model_path.suffix == ".tflite" or tflite.has_identifier(model_path):
        summary = tflite.summarize(model_path)
    elif model_path.suffix == ".xml":
        summary = openvino.summarize(model_path)
    else:
        summary = onnx.summarize(model_path)
    return summary.model_copy(update={"file": name, "bundle_files": bundle_files})


def _artifact_of(bundle: Path) -> Path:
    """Give the path of the file that the bundle's runtime loads."""
    if not (bundle / "manifest.json").is_file():
        raise ConfigError(
            f"{bundle}: no manifest.json; inspect takes an ONNX file, an OpenVINO IR, a .tflite file or a bundle. "
            "Name the file itself, or a directory that `edgeq export` wrote."
        )
    from edgeq.bundle.manifest import load_manifest

    model_path = bundle / load_manifest(bundle).artifact.files[0].path
    if model_path.suffix not in (".onnx", ".tflite", ".xml"):
        raise ConfigError(
            f"{model_path}: inspect takes ONNX and .tflite files and OpenVINO IRs. The bundle's manifest.json lists "
            "this file's operators under artifact.placement; its toolchain's own viewer shows its tensors."
        )
    if not model_path.is_file():
        raise BundleCorrupt(f"{model_path}: named by manifest.json, but not there. Export the bundle again.")
    return model_path
