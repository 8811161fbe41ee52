"""Bundles of one tiny model for several runtimes, each wrong in its own way, with FP32 in a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tiny_bundle import TinyBackend, make_config, make_golden, make_lineage, make_model, make_report, make_target

from edgeq.backends import tflite
from edgeq.bundle.write import write
from edgeq.data.sessions import Session
from edgeq.data.tokens import Feeds
from edgeq.errors import ToolMissing
from edgeq.records import Artifact, Manifest, Target
from edgeq.system.files import file_ref

FloatArray = NDArray[np.float32]


class AlteringBackend(TinyBackend):
    """Stand in for a runtime whose vectors are changed by a function."""

    def __init__(self, alter: Callable[[FloatArray], FloatArray]) -> None:
        super().__init__()
        self._alter = alter

    def load(self, artifact: Artifact, bundle: Path, target: Target, threads: int = 0) -> Session:
        session = super().load(artifact, bundle, target, threads)

        def embed(feeds: Feeds) -> FloatArray:
            return self._alter(session(feeds))  # type: ignore[operator]

        return embed


class MissingBackend(TinyBackend):
    """Stand in for a runtime that is not installed."""

    def tools(self) -> Mapping[str, str]:
        raise ToolMissing('some-runtime is not installed; pip install "some-runtime"')


def write_float(cache: Path, seed: int = 0) -> Path:
    """Put the FP32 model into the cache."""
    path = cache / "float-model" / f"{seed:064d}" / "model.onnx"
    make_model(path, seed)
    return path


def write_bundle(out: Path, name: str, backend: str, float_file: Path, seed: int = 0, **changes: object) -> Manifest:
    """Write a bundle for a target of this name, whose manifest names the float model."""
    inputs = out.parent / f"{out.name}-inputs-{seed}"
    artifact_dir, config_dir = inputs / "artifact", inputs / "config"
    if not inputs.exists():
        make_model(artifact_dir / "onnx" / "model.onnx", seed)
        make_config(config_dir)
    target = make_target(name=name, backend=backend, **changes)
    lineage = make_lineage(artifact_dir, target)
    changed = {"file": file_ref(float_file)}
    lineage = replace(lineage, float_model=lineage.float_model.model_copy(update=changed))
    golden = make_golden(artifact_dir, config_dir)
    return write(out / name, lineage, artifact_dir, config_dir, golden, make_report(target))


def write_tflite_bundle(out: Path, name: str, buckets_tokens: tuple[int, ...], seed: int = 0) -> Manifest:
    """Write a bundle of a tiny .tflite file; its golden texts record the vectors of the file made from seed 0."""
    from tiny_tflite import DIM, make_tflite

    inputs = out.parent / f"{name}-inputs"
    make_model(inputs / "unused" / "onnx" / "model.onnx")
    make_config(inputs / "config")
    interpreter = {"interpreter": "litert", "threads": 1, "bias_bits": 32, "upcast": "cast", "lookup": "none"}
    target = make_target(name=name, backend="tflite", buckets_tokens=buckets_tokens, runtime=interpreter)
    lineage = make_lineage(inputs / "unused", target)
    golden = make_golden(inputs / "unused", inputs / "config")
    for folder, number in ((inputs / "artifact", seed), (inputs / "reference", 0)):
        (folder / "tflite").mkdir(parents=True)
        (folder / "tflite" / "model.tflite").write_bytes(make_tflite(sorted(buckets_tokens), number))
    file = file_ref(inputs / "artifact" / "tflite" / "model.tflite", inputs / "artifact")
    artifact = lineage.artifact.model_copy(update={"files": (file,)})
    session = tflite.load(artifact, inputs / "reference", target)
    vectors = session(Feeds(golden.input_ids, golden.attention_mask))
    records = ("source", "float_model", "equalized_model", "qdq_model")
    sized = {key: getattr(lineage, key).model_copy(update={"dim": DIM}) for key in records}
    lineage = replace(lineage, artifact=artifact, **sized)
    golden = replace(golden, embeddings=vectors, reference=vectors)
    return write(out / name, lineage, inputs / "artifact", inputs / "config", golden, make_report(target))
