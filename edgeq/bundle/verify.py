"""Verify a bundle: hash its files, walk the chain of records, and run the golden samples again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.registry import find
from edgeq.bundle.agreement import disagreeing_limits
from edgeq.bundle.checksums import bundle_files, check_sums
from edgeq.bundle.golden import VECTORS, GoldenData, read_golden
from edgeq.bundle.golden_images import GoldenImages, read_golden_images
from edgeq.bundle.manifest import MANIFEST, PARITY, is_bundle, load_manifest, load_report, recorded_files, require_cpu
from edgeq.codecs.statistics import FILE, read_statistics
from edgeq.data.batches import PIXELS, Samples
from edgeq.data.sessions import embed_batches
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import Tokens, batches, token_limit
from edgeq.errors import BundleCorrupt, DeviceUnavailable, ParityFailed
from edgeq.evaluation.gate import fewest_samples, judge_end_to_end, judge_placement, judge_report, judge_settings
from edgeq.evaluation.vector_measures import centred_cosines
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.records import FileRef, Manifest, ParityReport, Record, RunKind, Status
from edgeq.system.files import file_ref
from edgeq.system.host import describe, run_kind

AnyGolden = GoldenData | GoldenImages

_SAME_MACHINE_ERROR_MAX = 1e-3
_SAME_MACHINE_COSINE_MIN = 0.9999


class Verification(Record):
    """Hold what was verified, and how near the golden vectors of this machine are to the recorded ones."""

    path: str
    target: str
    status: Status  # of the bundle, as recorded
    files: int  # hashed and unchanged, SHA256SUMS not counted
    golden_texts: int
    ran_on: RunKind  # on this machine
    machine: str  # this machine's CPU
    max_abs_error: float | None  # against the recorded vectors; None without them, or when it was not run
    cosine_min: float | None  # the same
    float32_cosine_min: float | None  # against FP32's recorded vectors; None when this machine did not run it
    reason: str | None = None  # why this machine did not run it


def verify(path: Path) -> Verification:
    """Hash every file, walk the chain from source to artifact, and run the golden samples again.

    On a CPU like the one that measured the bundle, the vectors must equal the recorded ones to 1e-3 and cosine 0.9999;
    on another one they must be as exact as the target's gate asks. A bundle that was never run is run only where its
    device is present, and its vectors must be as near to FP32 as the gate asks of the worst text.

    Raises:
        ConfigError: there is no bundle at this path, or edgeq lacks its backend.
        BundleCorrupt: a file, a link of the chain or a token id differs; the message names it.
        Unsupported: this CPU lacks flags the target needs.
        ParityFailed: the golden samples give other vectors on this machine.
        DeviceUnavailable: the bundle was measured on a device that this machine lacks.
    """
    manifest, report = read_whole(path)
    golden, samples = _golden(path, manifest)
    require_cpu(manifest.target)
    ran_on = run_kind(manifest.target.runs_on)
    verification = Verification(
        path=str(path),
        target=manifest.target.name,
        status=manifest.status,
        files=len(bundle_files(path)),
        golden_texts=len(golden.texts),
        ran_on="not-run",
        machine=describe(),
        max_abs_error=None,
        cosine_min=None,
        float32_cosine_min=None,
    )
    try:
        vectors = _run(path, manifest, golden, samples)
    except DeviceUnavailable as error:
        if report.measures is not None:
            raise
        return verification.model_copy(update={"reason": str(error)})
    verification = verification.model_copy(update={"ran_on": ran_on} | _errors(golden, vectors))
    judge_golden(path, manifest, verification, is_same_machine=(ran_on, describe()) == (report.ran_on, report.machine))
    return verification


def read_whole(path: Path) -> tuple[Manifest, ParityReport]:
    """Hash every file and walk the chain of records; give manifest and parity report.

    Raises:
        ConfigError: there is no bundle at this path.
        BundleCorrupt: a file or a link of the chain differs; the message names it.
    """
    if not is_bundle(path):
        load_manifest(path)  # says what is missing, if it is the manifest
    check_sums(path)
    manifest, report = load_manifest(path), load_report(path)
    _walk(path, manifest, report)
    return manifest, report


def _errors(golden: AnyGolden, vectors: NDArray[np.float32]) -> dict[str, float]:
    """Measure float32[texts, dim] against FP32's vectors and, where the artifact was run, against the recorded ones."""
    found = {"float32_cosine_min": float(centred_cosines(golden.reference, vectors).min())}
    if golden.embeddings is not None:
        found["max_abs_error"] = float(np.abs(golden.embeddings.astype(np.float64) - vectors).max())
        found["cosine_min"] = float(centred_cosines(golden.embeddings, vectors).min())
    return found


def _walk(path: Path, manifest: Manifest, report: ParityReport) -> None:
    """Compare the parity report with the manifest, whose own records agree, and each file with its record."""
    links = (
        (f"{PARITY}: target", report.target, "target.name", manifest.target.name),
        (f"{PARITY}: status", report.status, "status", manifest.status),
        (f"{PARITY}: gate", report.gate, "target.gate", manifest.target.gate),
    )
    broken = [f"{name} is {found}, but {other} is {needed}" for name, found, other, needed in links if found != needed]
    for ref in recorded_files(manifest):
        broken += _broken_file(path, ref)
    broken += disagreeing_limits(path, manifest, reads_tokenizer=True)
    broken += _broken_codecs(path, manifest)
    broken += _broken_vendor(manifest)
    broken += _broken_verdict(manifest, report)
    if broken:
        raise BundleCorrupt(f"{path / MANIFEST}: the chain is broken: {'; '.join(broken)}. Export the bundle again.")


def _broken_file(path: Path, ref: FileRef) -> list[str]:
    """Give the reason why a file is not the one that a record names, if any."""
    file = path / ref.path
    if not file.resolve().is_relative_to(path.resolve()) or not file.is_file():
        return [f"{ref.path} is not in the bundle"]
    return [] if file_ref(file, path) == ref else [f"{ref.path} is not the file with sha256 {ref.sha256}"]


def _broken_codecs(path: Path, manifest: Manifest) -> list[str]:
    """Say whether the statistics for codes are of vectors of another dimension."""
    if manifest.codecs is None or not (path / manifest.codecs.path).is_file():
        return []
    dim = read_statistics(path / manifest.codecs.path).dim
    return (
        [] if dim == manifest.source.dim else [f"{FILE} has dimension {dim}, but source.dim is {manifest.source.dim}"]
    )


def _broken_vendor(manifest: Manifest) -> list[str]:
    """Say which inputs of a vendor's compiler the bundle lacks; they are needed to build the artifact again."""
    qdq, scheme = manifest.qdq_model, manifest.qdq_model.scheme
    if (qdq.feeds is None) != (scheme.feeds == 0):
        found = "missing" if qdq.feeds is None else "there"
        return [f"qdq_model.feeds is {found}, but {scheme.name} asks for {scheme.feeds or 'none'}"]
    if QUANTIZERS[scheme.kind].writes_integers:
        return []
    shipped = {ref.sha256 for ref in manifest.artifact.files}
    given = {"qdq_model.file": qdq.file, "qdq_model.feeds": qdq.feeds}
    return [
        f"{name} (sha256 {ref.sha256}) is none of the artifact's files"
        for name, ref in given.items()
        if ref is not None and ref.sha256 not in shipped
    ]


def _broken_verdict(manifest: Manifest, report: ParityReport) -> list[str]:
    """Judge the recorded measures again, and compare the result with the report's status."""
    placement = manifest.artifact.placement
    if report.measures is None and report.status == "not-run":
        settings = judge_settings(report.other_settings, report.gate, fewest_samples(report.texts))
        failures = judge_placement(placement, report.gate) + settings + judge_end_to_end(report.end_to_end)
        is_told = report.reason is not None and report.ran_on == "not-run" and "not-run" in report.gate.export_run_kinds
        return [] if is_told and not failures else [f"{PARITY} says not-run, but {' '.join(failures) or 'not why'}"]
    if report.measures is None:
        return [f"{PARITY} says passed without measures"] if report.status == "passed" else []
    failures = judge_report(report, placement)
    if failures != report.failures or (report.status == "passed") != (not failures):
        return [f"{PARITY} says {report.status}, but its measures say: {' '.join(failures) or 'passed'}"]
    return []


def _golden(path: Path, manifest: Manifest) -> tuple[AnyGolden, Samples]:
    """Read the golden texts or images, and check that this machine tokenizes or resizes them as recorded."""
    if manifest.float_model.inputs == (PIXELS,):
        pictures = read_golden_images(path)
        _check_vectors(path, manifest, pictures)
        return pictures, _same_images(path, pictures)
    golden = read_golden(path)
    _check_vectors(path, manifest, golden)
    return golden, _same_tokens(path, manifest, golden)


def _same_images(path: Path, golden: GoldenImages) -> Samples:
    """Give the golden images if this machine prepares the test card with the recorded pixels, each to +-1."""
    from edgeq.data import image_preprocessing, images

    how = image_preprocessing.read(path / image_preprocessing.CONFIG)
    found = how.pixels(image_preprocessing.test_card())
    same = found.shape == golden.test_card.shape
    if not same or int(np.abs(found.astype(np.int16) - golden.test_card).max()) > 1:
        raise BundleCorrupt(
            f"{path / VECTORS}: the test card became other pixels than {image_preprocessing.CONFIG} gives here. "
            "Install the Pillow version that made it, or export again."
        )
    return images.Images(golden.codes, how)


def _check_vectors(path: Path, manifest: Manifest, golden: AnyGolden) -> None:
    """Compare count and dimension of the golden vectors with the manifest."""
    if (golden.embeddings is None) != (manifest.status == "not-run") and manifest.status != "failed":
        raise BundleCorrupt(
            f"{path / VECTORS}: the artifact's vectors do not fit a bundle recorded as {manifest.status}. "
            "Export the bundle again."
        )
    if len(golden.texts) != manifest.golden.count or golden.reference.shape[1] != manifest.source.dim:
        raise BundleCorrupt(
            f"{path / VECTORS}: {len(golden.texts)} texts of dimension {golden.reference.shape[1]}; the manifest "
            f"says {manifest.golden.count} of {manifest.source.dim}. Export the bundle again."
        )
    if isinstance(golden, GoldenData) and golden.input_ids.shape[1] > manifest.source.max_sequence:
        raise BundleCorrupt(
            f"{path / VECTORS}: texts of up to {golden.input_ids.shape[1]} tokens; the manifest's source.max_sequence "
            f"is {manifest.source.max_sequence}. Export the bundle again."
        )


def _same_tokens(path: Path, manifest: Manifest, golden: GoldenData) -> Tokens:
    """Tokenize the golden texts, and refuse token ids other than the recorded ones."""
    limit = token_limit(manifest.target.buckets_tokens, manifest.source.max_sequence)
    tokens = Tokenizer.from_file(path / "tokenizer.json", limit).encode(golden.texts)
    for row, (found, recorded) in enumerate(zip(tokens.ids, golden.token_ids(), strict=True), start=1):
        if list(found) != recorded:
            raise BundleCorrupt(
                f"{path / VECTORS}: text {row} has the token ids {recorded[:8]}...; the bundle's tokenizer.json "
                f"gives {list(found)[:8]}... Install the tokenizers version that made it, or export again."
            )
    return tokens


def _run(path: Path, manifest: Manifest, golden: AnyGolden, samples: Samples) -> NDArray[np.float32]:
    """Run the golden samples through the artifact, float32[samples, dim]."""
    session = find(manifest.artifact.backend, str(path)).load(manifest.artifact, path, manifest.target)
    vectors = embed_batches(session, batches(samples), len(golden.texts))
    if vectors.shape != golden.reference.shape or not np.isfinite(vectors).all():
        raise ParityFailed(
            f"{path}: the golden texts give vectors of shape {vectors.shape}, finite: {np.isfinite(vectors).all()}; "
            f"finite ones of shape {golden.reference.shape} are needed. Compare the runtime's version with the "
            "manifest's."
        )
    return vectors


def judge_golden(path: Path, manifest: Manifest, found: Verification, is_same_machine: bool) -> None:
    """Judge golden vectors against the recorded ones, more strictly on the same CPU; without any, against FP32.

    Args:
        path: of the bundle.
        manifest: of the bundle.
        found: what the golden vectors measure.
        is_same_machine: whether kind of run and CPU are those that the parity report names.

    Raises:
        ParityFailed: the vectors are too far off.
    """
    error, cosine, float_cosine = found.max_abs_error, found.cosine_min, found.float32_cosine_min
    if is_same_machine:
        is_near = error is not None and error <= _SAME_MACHINE_ERROR_MAX
        if is_near and cosine is not None and cosine >= _SAME_MACHINE_COSINE_MIN:
            return
        wanted = f"at most {_SAME_MACHINE_ERROR_MAX:g} and at least {_SAME_MACHINE_COSINE_MIN:g} are"
    else:
        gate = manifest.target.gate
        found_cosine, limit, other = cosine, gate.exactness_min, "the recorded ones"
        if cosine is None:  # nothing was run when the bundle was written
            found_cosine, limit, other = float_cosine, gate.centred_cosine_min_min, "FP32"
        if manifest.status == "failed" or (found_cosine is not None and found_cosine >= limit):
            return
        wanted = f"centred cosine of at least {limit:g} with {other} is"
    raise ParityFailed(
        f"{path}: every file is whole, but on this machine ({found.ran_on}) the golden texts give vectors with error "
        f"{_spell(error, '.2e')} and cosine {_spell(cosine, '.6f')} against the recorded ones, and cosine "
        f"{_spell(float_cosine, '.6f')} with FP32; {wanted} needed. Compare the runtime's version with the "
        "manifest's, or export on this machine."
    )


def _spell(number: float | None, form: str) -> str:
    return "unknown" if number is None else format(number, form)
