"""Tiny bundles that a runtime of the device script can run, and the script itself as a module."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tiny_bundle import (
    GATE,
    PAD_ID,
    TEXTS,
    make_bundle,
    make_config,
    make_lineage,
    make_model,
    make_report,
    make_target,
)

from edgeq.bundle.checksums import write_sums
from edgeq.bundle.device_script import device_script
from edgeq.bundle.golden import GoldenData
from edgeq.bundle.write import write
from edgeq.system.files import file_ref

ORT = {"intra_op_threads": 1, "graph_optimization": "all"}
# The golden vectors of tiny bundles carry noise against FP32's, so that what is compared is not equal.
TINY_GATE = GATE.model_copy(update={"centred_cosine_mean_min": 0.98, "centred_cosine_min_min": 0.95})


def load_script() -> ModuleType:
    """Import the device script, as it lies in tools/device."""
    spec = importlib.util.spec_from_file_location("device_validate", device_script())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ort_bundle(out: Path, **changes: Any) -> Path:
    """Write a bundle for ONNX Runtime on this machine; `changes` are the target's."""
    given = {"backend": "onnxruntime", "runtime": ORT, "gate": TINY_GATE, **changes}
    return make_bundle(out, target=make_target(**given))[0]


def tflite_bundle(out: Path, lengths: tuple[int, ...] = (16, 32), texts: int = 32, **changes: Any) -> Path:
    """Write a bundle for LiteRT with a signature for each length; FP32's vectors are the artifact's and some noise."""
    from tiny_tflite import VOCABULARY, make_tflite

    artifact, config = out.parent / f"{out.name}-artifact", out.parent / f"{out.name}-config"
    make_model(artifact / "onnx" / "model.onnx")
    make_config(config)
    runtime = {"interpreter": "litert", "threads": 1, "bias_bits": 32, "upcast": "cast", "lookup": "roots"}
    free = TINY_GATE.model_copy(update={"norm_error_unnormalized_max": 1.0, "invariance_min": 0.99})
    given = {"backend": "tflite", "buckets_tokens": lengths, "gate": free, "runtime": runtime, **changes}
    target = make_target(**given)
    lineage = make_lineage(artifact, target)
    (artifact / "model.tflite").write_bytes(make_tflite(lengths))
    files = (file_ref(artifact / "model.tflite", artifact),)
    sized = {"dim": 24, "max_sequence": max(lengths)}
    lineage = dataclasses.replace(
        lineage,
        artifact=lineage.artifact.model_copy(update={"files": files}),
        **{name: getattr(lineage, name).model_copy(update=sized)
           for name in ("source", "float_model", "equalized_model", "qdq_model")},
    )  # fmt: skip
    random = np.random.default_rng(0)
    sizes = random.integers(1, max(lengths) + 1, texts)
    mask = (np.arange(max(lengths)) < sizes[:, None]).astype(np.int64)
    ids = np.where(mask == 1, random.integers(1, VOCABULARY, mask.shape), PAD_ID)
    vectors = _tflite_vectors(artifact / "model.tflite", ids, mask)
    noise = random.standard_normal(vectors.shape).astype(np.float32) * vectors.std() * np.float32(0.05)
    golden = GoldenData(TEXTS[:texts], ids, mask, vectors + noise, vectors, PAD_ID)
    write(out / target.name, lineage, artifact, config, golden, make_report(target))
    return out / target.name


def _tflite_vectors(path: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Run the texts as edgeq's own backend does, float32[texts, dim]."""
    from edgeq.backends.tflite import open_session
    from edgeq.data.tokens import Feeds

    return open_session(path, "litert", 1)(Feeds(ids, mask))


def edit_manifest(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make the sums agree."""
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    write_sums(path)


def without_runtime(folder: Path, name: str = "onnxruntime") -> list[str]:
    """Give a Python, as a command, in which a runtime cannot be imported."""
    lines = (
        "import runpy, sys", f"sys.modules[{name!r}] = None", "sys.argv = sys.argv[1:]",
        "runpy.run_path(sys.argv[0], run_name='__main__')",
    )  # fmt: skip
    script = folder / "without.py"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [sys.executable, str(script)]
