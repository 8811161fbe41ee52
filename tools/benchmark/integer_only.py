"""Measure what an integer-only .tflite file costs: resident memory of the loaded file, and lowering."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from benchmark.figures import Blank, Figures
from benchmark.making import Made, Workshop, note
from benchmark.processes import last_line, measured
from edgeq.backends import tflite
from edgeq.backends.tflite import SIGNATURE
from edgeq.bundle.manifest import load_manifest
from edgeq.system.child_server import pack
from edgeq.system.worker import Worker, child_command

_CHILD = Path(tflite.__file__).with_name("child.py")
_RUNTIME = "litert"
_ROUNDS = 3

_LOWER = """
import sys
from pathlib import Path
from edgeq.backends.registry import find
from edgeq.bundle.manifest import load_manifest
from edgeq.system.files import file_ref
manifest = load_manifest(Path(sys.argv[1]))
model = manifest.qdq_model.model_copy(update={"file": file_ref(Path(sys.argv[2]))})
find(manifest.target.backend, sys.argv[1]).lower(model, manifest.target, Path(sys.argv[3]))
"""


def costs(made: Made, workshop: Workshop) -> Figures:
    """Measure one bundle for LiteRT, each figure in processes of its own."""
    if made.path is None:
        return dict.fromkeys(("resident_above_bare_mb", "lowering_s", "lowering_peak_gb"), Blank(made.reason))
    note(f"tflite: {made.row.name}")
    return {**resident(made.path), **lowering(made.path, workshop)}


def resident(bundle: Path) -> Figures:
    """Give the memory of a process that has run every bucket once, above one that has only loaded the runtime."""
    bare, full = ([_resident(bundle, is_loaded) for _ in range(_ROUNDS)] for is_loaded in (False, True))
    figures = {"bare_mb": float(np.median(bare)), "resident_mb": float(np.median(full))}
    return {**figures, "resident_above_bare_mb": figures["resident_mb"] - figures["bare_mb"]}


def _resident(bundle: Path, is_loaded: bool) -> float:
    manifest = load_manifest(bundle)
    with Worker(child_command(sys.executable, _CHILD, _RUNTIME), _RUNTIME) as worker:
        worker.call(do="version")
        if is_loaded:
            worker.call(do="load", path=str((bundle / manifest.artifact.files[0].path).resolve()), threads=1)
            for bucket in manifest.target.buckets_tokens:
                tokens = pack(np.ones((1, bucket), np.int32))
                inputs = {"input_ids": tokens, "attention_mask": tokens}
                worker.call(do="run", signature=SIGNATURE.format(bucket), inputs=inputs)
        return int(worker.call(do="memory")["resident_bytes"]) / 1e6


def lowering(bundle: Path, workshop: Workshop) -> Figures:
    """Time the whole process that turns the QDQ model into the file, its imports included."""
    out = workshop.folder / "lowered"
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", _LOWER, bundle, workshop.qdq_model(bundle), out]
    ran = measured(command, workshop.folder / "lowered.log")
    if ran.exit_code:
        reason = Blank(f"lowering: exit code {ran.exit_code}: {last_line(ran.log)}")
        return {"lowering_s": reason, "lowering_peak_gb": reason}
    return {"lowering_s": ran.seconds, "lowering_peak_gb": ran.peak_gb}
