"""Render a bundle's model card (README.md): figures, their origin, and how to run the artifact without edgeq."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from edgeq.data.tokens import bucket_lengths
from edgeq.evaluation.gate import shown
from edgeq.frontend.torch import text_towers
from edgeq.frontend.torch.sentence_transformers import truncated_to
from edgeq.frontend.torch.supported_modules import TABLE
from edgeq.records import Manifest, ParityReport, RunKind

if TYPE_CHECKING:
    from edgeq.data.image_preprocessing import Preprocessing

_TEMPLATE = "model_card.md.j2"
_CONTEXT_SUFFIX = "_ctx.onnx"  # ONNX around a compiled binary, which only its provider can run
# The artifact files that sentence-transformers opens itself -> the name of its backend and extra.
SENTENCE_TRANSFORMERS_FILES = {"onnx/model.onnx": "onnx", "openvino/openvino_model.xml": "openvino"}

_RUN_KINDS: dict[RunKind, str] = {
    "device": "the runtime that ships, on a machine that meets the target",
    "host-kernels": "the same runtime and file, on another kind of CPU than the target's",
    "emulator": "an emulated processor; its vectors count, its timings do not",
    "simulator": "a functional model of the device; its timings do not count",
    "not-run": "nowhere: nothing was measured",
}


def render_card(
    manifest: Manifest, report: ParityReport, pad_id: int, preprocessing: Preprocessing | None = None
) -> str:
    """Give the model card as Markdown.

    Args:
        manifest: of the bundle.
        report: of the bundle.
        pad_id: the padding token's id, for the usage example.
        preprocessing: of an image model.
    """
    # Markdown, so nothing is HTML-escaped; an undefined name in the template raises instead of printing nothing.
    environment = Environment(
        loader=PackageLoader("edgeq.bundle"),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    is_context = manifest.artifact.files[0].path.endswith(_CONTEXT_SUFFIX)
    is_onnx = manifest.artifact.files[0].path.endswith(".onnx") and not is_context
    is_tflite = manifest.artifact.files[0].path.endswith(".tflite")
    is_openvino = manifest.artifact.files[0].path.endswith(".xml")
    buckets = bucket_lengths(manifest.target.buckets_tokens, manifest.source.max_sequence)
    padded_to = text_towers.padded_to(manifest.source.modules)
    return environment.get_template(_TEMPLATE).render(
        manifest=manifest,
        report=report,
        limits=_limits(report),
        run_kind=_RUN_KINDS[report.ran_on],
        pad_id=pad_id,
        padded_to=padded_to,
        preprocessing=preprocessing,
        model_path=_runnable(manifest),
        placement=manifest.artifact.placement,
        interpreter=manifest.target.runtime.get("interpreter", "litert"),
        is_onnx=is_onnx,
        is_tflite=is_tflite,
        is_context=is_context,
        is_openvino=is_openvino,
        is_rknn=manifest.artifact.files[0].path.endswith(".rknn"),
        weights_path=manifest.artifact.files[-1].path,
        sentence_transformers_backend=SENTENCE_TRANSFORMERS_FILES.get(manifest.artifact.files[0].path),
        buckets=buckets,
        token_limit=max(buckets, default=manifest.source.max_sequence),
        opens_in_sentence_transformers=(
            manifest.artifact.files[0].path in SENTENCE_TRANSFORMERS_FILES
            and preprocessing is None
            and "last_hidden_state" in manifest.qdq_model.outputs
            and manifest.source.modules[0] != TABLE
            and not manifest.source.code  # the bundle holds none of it, and sentence-transformers would ask for it
            and not manifest.source.modules[0].startswith(text_towers.TOWER)
        ),
        truncation=truncated_to(manifest.source.modules),
        size_mb=sum(file.size_bytes for file in manifest.artifact.files) / 1e6,
    )


def _runnable(manifest: Manifest) -> str:
    """Name the first file that no accelerator's compiler wrote: a compiled file runs on its device only."""
    compiled = {item.file for item in manifest.artifact.placement.estimates}
    return next(file.path for file in manifest.artifact.files if file.path not in compiled)


def _limits(report: ParityReport) -> list[tuple[str, str, str]]:
    """Give name, value and limit of each measure."""
    measured, gate = report.measures, report.gate
    if measured is None:
        return []
    rows = list(shown(measured, gate))
    if report.exactness is not None:
        near = report.exactness
        name = f"exactness: centred cosine with the QDQ model, worst of {near.texts}"
        rows.append((name, f"{near.centred_cosine_min:.5f}", f">= {gate.exactness_min:g}"))
    return rows
