"""Run the stages whose results targets share (export, calibrate, quantise, FP32 vectors), each cached by its request.

A function here makes the stage's request from what the export holds; `edgeq.pipeline.stage_functions` does the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from edgeq.calibration.file import load
from edgeq.codecs.statistics import VectorStatistics, observe_vectors
from edgeq.data.batches import Samples
from edgeq.data.sessions import Embeddings
from edgeq.data.splits import evenly_spaced
from edgeq.frontend.locate import Located
from edgeq.graph import external_data
from edgeq.pipeline.growing_validation import growing, sizes
from edgeq.pipeline.stage_functions import (
    CALIBRATION,
    FEEDS,
    FLOAT_MODEL,
    QDQ,
    QDQ_MODEL,
    REFERENCE,
    TOKENS,
    VECTORS,
)
from edgeq.pipeline.stage_requests import CalibrationRequest, FloatModelRequest, QdqRequest, ReferenceRequest
from edgeq.pipeline.stage_results import EQUALIZED, FLOAT, STATISTICS, Calibrated, Floats, Validation, read_record
from edgeq.quantization import schemes, sensitivity, vendor_codes
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.quantization.weight_losses import measure as measure_weights
from edgeq.records import Calibration, FloatModel, QdqModel, Scheme, Source, Target
from edgeq.system.cache import Cache
from edgeq.system.files import file_ref
from edgeq.system.made_by import foreign_code, own_code
from edgeq.system.progress import Progress
from edgeq.system.stage import InputFile, input_file, input_files

if TYPE_CHECKING:
    from edgeq.data.prepare import Items, Plan

_CODEC_SAMPLES = 128  # int8's range and the spread of each dimension need no more (docs/decisions/vectors.md)

# Whose versions a manifest names.
EXPORT_TOOLS = ("torch", "transformers", "sentence-transformers", "onnx", "onnxscript", "onnx-ir", "numpy")


def float_model(located: Located, has_hidden_state: bool, cache: Cache) -> Floats:
    """Export the model, or take it from the cache.

    Raises:
        Unsupported: the graph holds what no target takes; the message says where, and the way out.
        EdgeqError: any other failure of `edgeq.frontend.float_model.write_float_model`.
    """
    folder = cache.result(FLOAT_MODEL, _float_model_request(located, has_hidden_state))
    source = Source.model_validate_json((folder / "source.json").read_bytes())
    return Floats(source, read_record(FloatModel, folder / "model.json", folder / FLOAT), folder)


def has_float_model(located: Located, has_hidden_state: bool, cache: Cache) -> bool:
    """Tell whether the cache holds the exported model."""
    return cache.holds(FLOAT_MODEL, _float_model_request(located, has_hidden_state))


def _float_model_request(located: Located, has_hidden_state: bool) -> FloatModelRequest:
    named = replace(located, name=located.display_name)
    return FloatModelRequest(made_by=foreign_code(), located=named, hidden_state=has_hidden_state)


def calibrated(floats: Floats, plan: Plan, seed: int, cache: Cache, progress: Progress) -> Calibrated:
    """Equalise the float model and observe its tensors on calibration samples, or read both from the cache.

    Args:
        floats: the float model.
        plan: which texts or images calibrate.
        seed: of the choice of texts that judge SmoothQuant's alphas.
        cache: for the equalised model and the statistics.
        progress: called as `progress(stage, done, total)`.
    """
    texts, images = _samples(plan.calibration)
    request = CalibrationRequest(
        made_by=own_code(), float_model=floats.model, config=input_files(floats.config), texts=texts, images=images,
        limit=floats.model.max_sequence, origin=plan.origin, seed=seed,
    )  # fmt: skip
    folder = cache.result(CALIBRATION, request, progress)
    return Calibrated(
        read_record(FloatModel, folder / "equalized.json", folder / EQUALIZED),
        read_record(Calibration, folder / "calibration.json", folder / STATISTICS),
        folder,
    )


def quantized(target: Target, calibrated: Calibrated, cache: Cache, given: Scheme | None = None) -> QdqModel:
    """Quantise with the target's scheme, or read the QDQ model from the cache: targets with equal schemes share it.

    Args:
        target: whose scheme is used.
        calibrated: the equalised model and its calibration.
        cache: for QDQ models.
        given: the target's scheme with some products promoted.

    Raises:
        ConfigError: a product that is promoted is not there.
    """
    tokens = calibrated.folder / TOKENS
    request = QdqRequest(
        made_by=own_code(), equalized=calibrated.equalized, calibration=calibrated.calibration,
        tokens=file_ref(tokens) if tokens.is_file() else None,
        scheme=given or schemes.find(target.scheme, target.name),
    )  # fmt: skip
    folder = cache.result(QDQ_MODEL, request)
    found = read_record(QdqModel, folder / "qdq.json", folder / QDQ)
    if found.feeds is None:
        return found
    return found.model_copy(update={"feeds": found.feeds.model_copy(update={"path": str(folder / FEEDS)})})


def sensitivities(
    calibrated: Calibrated, model: QdqModel, samples: Samples, progress: Progress
) -> sensitivity.Sensitivity:
    """Measure what the codes of each product of a QDQ model cost, on a few of the samples.

    Where a vendor's compiler makes the codes, ONNX Runtime gets such codes in its place.
    """
    counterpart, coded = _counterparts(calibrated, model)
    return sensitivity.measure(counterpart, coded, model.scheme, model.integer_matmuls, samples, progress)


def weight_losses(
    calibrated: Calibrated, model: QdqModel, samples: Samples, progress: Progress, sites: Sequence[sensitivity.Site]
) -> tuple[float, ...]:
    """Measure what the 8-bit weights of each site of a QDQ model cost, on a few of the samples."""
    counterpart, coded = _counterparts(calibrated, model)
    return measure_weights(counterpart, coded, [site.names for site in sites], samples, progress)


def _counterparts(calibrated: Calibrated, model: QdqModel) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Give the float model whose tensors a QDQ model holds as integers, and a model with the codes."""
    equalized = external_data.load(Path(calibrated.equalized.file.path))
    statistics = load(Path(calibrated.calibration.file.path))
    quantizer = QUANTIZERS[model.scheme.kind]
    counterpart = quantizer.rewrite(equalized, statistics, model.scheme)
    if not quantizer.writes_integers:
        return counterpart, vendor_codes.coded(equalized, statistics, model.integer_matmuls)
    return counterpart, external_data.load(Path(model.file.path))


def validation(floats: Floats, plan: Plan, cache: Cache, limit: int) -> Validation:
    """Embed the first part of the validation texts (cut at `limit` tokens) or images, or read it from the cache."""
    return next(growing_validation(floats, plan, cache, limit))


def growing_validation(
    floats: Floats, plan: Plan, cache: Cache, limit: int, first: int | None = None
) -> Iterator[Validation]:
    """Give the validation samples of a plan in growing parts, with FP32's vectors; each part's are cached.

    Args:
        floats: the float model.
        plan: which texts or images validate.
        cache: for the vectors.
        limit: the most tokens of a text.
        first: at most so many samples in the first part; None leaves it to the set.
    """

    def embed(items: Items, done: int) -> Embeddings:
        texts, images = _samples(items)
        request = ReferenceRequest(
            made_by=own_code(), float_model=floats.model, config=input_files(floats.config), texts=texts, images=images,
            limit=limit,
        )  # fmt: skip
        vectors: Embeddings = np.load(cache.result(REFERENCE, request) / VECTORS, allow_pickle=False)
        return vectors

    parts = sizes(len(plan.validation), plan.validation_origin, first)
    return growing(plan.validation, parts, plan.validation_origin, floats.config, limit, embed)


def vector_statistics(floats: Floats, plan: Plan, cache: Cache) -> VectorStatistics:
    """Observe FP32's vectors of calibration samples, evenly spaced, for codecs; all targets share the statistics.

    Args:
        floats: the float model.
        plan: which texts or images calibrate.
        cache: for the vectors.
    """
    texts, images = _samples(plan.calibration)
    chosen = evenly_spaced(len(plan.calibration), _CODEC_SAMPLES)
    texts = tuple(texts[row] for row in chosen if texts)
    images = tuple(images[row] for row in chosen if images)
    request = ReferenceRequest(
        made_by=own_code(), float_model=floats.model, config=input_files(floats.config), texts=texts, images=images,
        limit=floats.model.max_sequence,
    )  # fmt: skip
    vectors: Embeddings = np.load(cache.result(REFERENCE, request) / VECTORS, allow_pickle=False)
    return observe_vectors(vectors, f"FP32, {len(chosen)} calibration samples of {plan.origin}")


def _samples(items: Items) -> tuple[tuple[str, ...], tuple[InputFile, ...]]:
    """Give the texts and the image files of one part of a plan; one of the two is empty."""
    texts = tuple(item for item in items if isinstance(item, str))
    return texts, tuple(input_file(item.path, item.name) for item in items if not isinstance(item, str))


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Give the versions of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
