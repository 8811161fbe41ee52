"""Take one small model of an architecture through the whole pipeline in this process, and measure what came out."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import architectures
import numpy as np
import onnx
import tiny_source

from edgeq import targets
from edgeq.backends.registry import find
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import Tokens, batches
from edgeq.errors import EdgeqError
from edgeq.evaluation.vector_measures import measured
from edgeq.frontend import locate
from edgeq.frontend.torch.convert import CONFIG, PROBES, RAW, convert, load_probes
from edgeq.graph import dialect
from edgeq.graph.float_session import FloatSession
from edgeq.passes import float_passes
from edgeq.pipeline import calibrate
from edgeq.pipeline.check import check_float_model
from edgeq.quantization import quantize, schemes
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.records import FileRef, QdqModel, Source, Target
from edgeq.system.files import file_ref

CALIBRATION, VALIDATION = 96, 128  # texts
LENGTHS = (16, 32, 64)  # of static artifacts, in tokens
NOWHERE = FileRef(path="model.onnx", sha256="0" * 64, size_bytes=0)
CENTRED_MIN, REGRET_MAX = 0.98, 0.02  # mean over the texts, both

# Column of the table -> the target whose backend and scheme stand for it.
TARGETS = {
    "ONNX Runtime": "x86-64-onnxruntime", "OpenVINO": "intel-openvino-cpu", "LiteRT": "integer-only-w8a16",
    "Ethos-U": "ethos-u85-256", "Qualcomm HTP": "snapdragon-8-gen-3",
}  # fmt: skip
SCHEMES = {"LiteRT": "w8a8-int"}
COMPILED = frozenset({"Ethos-U"})  # for a device: compiled here, not run
EMULATED = {"Qualcomm HTP": 64}  # texts, the first of those that validate the others: an emulator is slow


class Exported(NamedTuple):
    """A float model, proved against torch, with texts, and what calibrating it gave."""

    name: str
    record: Source
    model: onnx.ModelProto
    error: float
    calibration: Tokens
    validation: Tokens
    reference: Embeddings
    observed: calibrate.Observed


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def export(name: str, folder: Path) -> Exported:
    """Build, export, rewrite and calibrate; the graph is in the dialect and gives torch's vectors."""
    tower = architectures.ARCHITECTURES[name].tower
    located = locate.locate(str(architectures.write(name, folder / name)), tower=tower)
    out = folder / f"{name}-raw"
    out.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it exports
        record = convert(located, out, hidden_state=True)
    feeds, expected = load_probes(out / PROBES)
    model, _ = float_passes.rewritten(onnx.load(out / RAW), feeds)
    dialect.verify(model, name)
    session = FloatSession.of(model)
    error = max(float(np.abs(vectors - session(feed)).max()) for feed, vectors in zip(feeds, expected, strict=True))
    tokenizer = Tokenizer.from_file(out / CONFIG / "tokenizer.json", record.max_sequence)
    texts = [tokenizer.encode(tiny_source.texts(count, seed)) for count, seed in ((CALIBRATION, 1), (VALIDATION, 2))]
    reference = embed_batches(session, batches(texts[1]), VALIDATION)
    observed = calibrate.calibrate(model, texts[0], 0, silent)
    return Exported(name, record, model, error, texts[0], texts[1], reference, observed)


def nearness(reference: Embeddings, vectors: Embeddings) -> dict[str, float]:
    """Give centred cosine, mean and least, and regret@10 of vectors against FP32's.

    Plain cosine says nothing of random weights: vectors of different texts share 0.9 and more.
    """
    found = measured(reference, vectors)
    return {
        "centred": found["centred_cosine_mean"], "centred_min": found["centred_cosine_min"],
        "regret": found["regret_mean"],
    }  # fmt: skip


def lowered(
    made: Exported, column: str, folder: Path, name: str = "", scheme: str = "", texts: int = 0
) -> dict[str, Any]:
    """Quantise and lower for a column of the table; run it where this machine can, and say why not where it refuses.

    `name` of a target, `scheme` and the number of `texts` take the place of the column's own.

    Where `edgeq check` says another thing of the model than happened, "check_differs" says which.
    """
    target = targets.load_target(name or TARGETS[column])
    if target.buckets_tokens:
        lengths = {"LiteRT": LENGTHS, "Qualcomm HTP": LENGTHS[-1:]}.get(column, LENGTHS[:1])
        target = target.model_copy(update={"buckets_tokens": lengths})
    target = target.model_copy(update={"scheme": scheme or SCHEMES.get(column, target.scheme)})
    found = _lowered(made, column, target, folder, texts or EMULATED.get(column, VALIDATION))
    (said,) = check_float_model(made.model, NOWHERE, made.record.max_sequence, [target])
    refusals = [problem for problem in said.problems if "stay on the host" not in problem]  # a limit of the gate
    if bool(refusals) is not (found["form"] == "refused"):
        found["check_differs"] = f"check says {refusals or 'that it is taken'}; lowering: {found.get('reason', 'done')}"
    elif found.get("on_host", 0) != len(said.host_operators):
        found["check_differs"] = (
            f"check says {len(said.host_operators)} operators stay on the host: {said.host_operators}"
        )
    return found


def _lowered(made: Exported, column: str, target: Target, folder: Path, texts: int) -> dict[str, Any]:
    name = target.name
    scheme, backend = schemes.find(target.scheme, name), find(target.backend, name)
    out = folder / f"{made.name}-{name}-{target.scheme}"
    out.mkdir()
    try:
        proto, integer, floats = quantize.quantize(made.observed.model, made.observed.statistics, scheme)
        onnx.save(proto, out / "qdq.onnx")
        model = QdqModel(
            file=file_ref(out / "qdq.onnx"), float_model_sha256="0" * 64, calibration_sha256="0" * 64, scheme=scheme,
            inputs=("input_ids", "attention_mask"), outputs=tuple(item.name for item in proto.graph.output),
            dim=made.record.dim, max_sequence=made.record.max_sequence, integer_matmuls=integer, float_matmuls=floats,
        )  # fmt: skip
        artifact = backend.lower(model, target, out)
        result: dict[str, Any] = {"form": "mixed" if QUANTIZERS[scheme.kind].keeps_float else "integer"}
        floating = artifact.placement.float_fallbacks
        if floating:
            return {"form": "refused", "reason": f"products run in float: {', '.join(floating)}"}
        if column in COMPILED:
            return result | {"on_host": len(getattr(artifact.placement, "host_operators", ()))}
        session = backend.load(artifact, out, target)
        chosen = made.validation.chosen(range(texts))
        vectors = embed_batches(session, batches(chosen), texts)
    except EdgeqError as error:
        return {"form": "refused", "reason": str(error).splitlines()[0]}
    return result | nearness(made.reference[:texts], vectors)


def ort_static(made: Exported, folder: Path) -> dict[str, Any]:
    """Quantise the same float model as ONNX Runtime's own tool does without options, on the same texts."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(made.calibration.ids)

        def get_next(self) -> dict[str, Any] | None:
            ids = next(self._rows, None)
            if ids is None:
                return None
            return {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}

    plain, out = folder / f"{made.name}-plain.onnx", folder / f"{made.name}-static.onnx"
    onnx.save(made.model, plain)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        quantize_static(plain, out, Reader())
        vectors = embed_batches(FloatSession.of(out), batches(made.validation), VALIDATION)
    except Exception as error:  # foreign code, which may raise anything; the table says that it did
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    finally:
        logging.getLogger().setLevel(level)
    if not np.isfinite(vectors).all():
        return {"failed": "gives NaN"}
    return dict(nearness(made.reference, vectors))
