"""Write a bundle into a temporary sibling folder, and rename that: no half-written bundle is ever visible."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from edgeq.bundle.agreement import disagreeing_limits, disagreements
from edgeq.bundle.checksums import SUMS, check_sums, write_sums
from edgeq.bundle.client_files import state_client_settings, state_limit
from edgeq.bundle.device_script import SCRIPT, device_script
from edgeq.bundle.golden import TEXTS, VECTORS, GoldenData, write_golden
from edgeq.bundle.golden_images import GoldenImages, write_golden_images
from edgeq.bundle.manifest import MANIFEST, PARITY, is_bundle
from edgeq.bundle.model_card import SENTENCE_TRANSFORMERS_FILES, render_card
from edgeq.codecs.statistics import FILE as CODECS
from edgeq.data import end_to_end
from edgeq.data.tokens import token_limit
from edgeq.errors import BundleCorrupt, ConfigError, EdgeqError
from edgeq.records import (
    Artifact,
    Calibration,
    FileRef,
    FloatModel,
    Golden,
    Manifest,
    ParityReport,
    QdqModel,
    Record,
    Source,
    Target,
)
from edgeq.system.files import file_ref, replacing_dir, storage_errors

_CARD = "README.md"

FiledT = TypeVar("FiledT", FloatModel, Calibration, QdqModel)


@dataclass(frozen=True)
class Lineage:
    """Hold the records of all stages, which a manifest chains by sha256."""

    edgeq: str
    command: tuple[str, ...]
    target: Target
    source: Source
    float_model: FloatModel
    equalized_model: FloatModel
    calibration: Calibration
    qdq_model: QdqModel
    artifact: Artifact
    tools: dict[str, str]


def write(
    bundle_dir: Path,
    lineage: Lineage,
    artifact_dir: Path,
    config_dir: Path,
    golden: GoldenData | GoldenImages,
    report: ParityReport,
    overwrite: bool = False,
    client_settings: Mapping[str, object] | None = None,
    codecs: bytes | None = None,
) -> Manifest:
    """Write a bundle; equal inputs give equal bytes.

    An existing bundle with the same bytes is verified and kept.

    Args:
        bundle_dir: OUT/TARGET; its parents are made.
        lineage: the records.
        artifact_dir: the folder with the artifact's files; the paths of its record are relative to it.
        config_dir: the folder with tokenizer, config and module files, all copied.
        golden: the golden texts.
        report: its status becomes the bundle's.
        overwrite: replace a bundle made from other inputs.
        client_settings: with which sentence-transformers opens the artifact as it was validated, from a backend with
            `HasClientSettings`.
        codecs: the statistics of vectors that codes need, as `edgeq.codecs.statistics` writes them.

    Raises:
        ConfigError: `bundle_dir` is no bundle, or one from other inputs and `overwrite` is not set.
        BundleCorrupt: the same bundle exists, but is damaged; or the records, the configuration and the golden texts do
            not belong together.
        StorageFailed: the disk refuses.
        EdgeqError: the inputs do not belong together.
    """
    require_replaceable(bundle_dir)
    with storage_errors(f"writing the bundle {bundle_dir}"):
        bundle_dir.parent.mkdir(parents=True, exist_ok=True)
        with replacing_dir(bundle_dir) as partial:
            manifest = _fill(partial, lineage, artifact_dir, config_dir, golden, report, client_settings, codecs)
            if is_bundle(bundle_dir) and not overwrite:
                _require_same(bundle_dir, partial)
    return manifest


def take(made: Path, bundle_dir: Path, overwrite: bool = False) -> None:
    """Copy a bundle made in another folder to `bundle_dir`, as `write` would have written it.

    Raises:
        ConfigError: `bundle_dir` is no bundle, or one from other inputs and `overwrite` is not set.
        BundleCorrupt: the copied or the existing bundle is damaged.
        StorageFailed: the disk refuses.
    """
    check_sums(made)
    require_replaceable(bundle_dir)
    with storage_errors(f"writing the bundle {bundle_dir}"), replacing_dir(bundle_dir) as partial:
        shutil.copytree(made, partial, dirs_exist_ok=True)
        if is_bundle(bundle_dir) and not overwrite:
            _require_same(bundle_dir, partial)


def require_replaceable(bundle_dir: Path) -> None:
    """Refuse a path that holds anything but a bundle or an empty folder.

    Raises:
        ConfigError: it does.
    """
    if not bundle_dir.exists() or is_bundle(bundle_dir):
        return
    if not bundle_dir.is_dir() or any(bundle_dir.iterdir()):
        raise ConfigError(
            f"{bundle_dir}: is there and is no edgeq bundle, so it is left alone, with --overwrite too. "
            "Move it away, or give another --out."
        )


def _require_same(bundle_dir: Path, partial: Path) -> None:
    """Refuse to replace a bundle from other inputs, or a damaged one, without --overwrite."""
    if (bundle_dir / SUMS).read_bytes() != (partial / SUMS).read_bytes():
        raise ConfigError(
            f"{bundle_dir}: holds a bundle made from other inputs. Give --overwrite to replace it, or another --out."
        )
    check_sums(bundle_dir)


def _fill(
    directory: Path,
    lineage: Lineage,
    artifact_dir: Path,
    config_dir: Path,
    golden: GoldenData | GoldenImages,
    report: ParityReport,
    client_settings: Mapping[str, object] | None,
    codecs: bytes | None,
) -> Manifest:
    """Write every file of a bundle, SHA256SUMS last."""
    needed = "tokenizer.json" if isinstance(golden, GoldenData) else "preprocessor_config.json"
    if not (config_dir / needed).is_file():
        raise EdgeqError(f"{config_dir}: {needed} is not there; a bundle cannot be used without. Export again.")
    for ref in lineage.artifact.files:
        _copy(artifact_dir / ref.path, directory / ref.path)
        if file_ref(directory / ref.path, directory) != ref:
            raise EdgeqError(f"{artifact_dir / ref.path}: is not the file its record names. Export again.")
    for path in sorted(config_dir.rglob("*")):
        if path.is_file():
            _copy(path, directory / path.relative_to(config_dir))
    _copy(device_script(), directory / SCRIPT)
    if isinstance(golden, GoldenData):
        limit = token_limit(lineage.target.buckets_tokens, lineage.source.max_sequence)
        state_limit(directory, limit)
        found = end_to_end.compare(directory, lineage.source, limit)  # of the very files that the bundle carries
        end_to_end.require_same(found, str(directory))
        if client_settings is not None and lineage.artifact.files[0].path in SENTENCE_TRANSFORMERS_FILES:
            state_client_settings(directory, client_settings)
        write_golden(directory, golden)
    else:
        write_golden_images(directory, golden)
    _write_record(directory / PARITY, report)
    if codecs is not None:
        (directory / CODECS).write_bytes(codecs)
    manifest = Manifest(
        format=1,
        edgeq=lineage.edgeq,
        command=lineage.command,
        status=report.status,
        target=lineage.target,
        source=lineage.source,
        float_model=_unshipped(lineage.float_model),
        equalized_model=_unshipped(lineage.equalized_model),
        calibration=_unshipped(lineage.calibration),
        qdq_model=_without_feeds_path(_unshipped(lineage.qdq_model)),
        artifact=lineage.artifact,
        parity=file_ref(directory / PARITY, directory),
        golden=Golden(
            count=len(golden.texts),
            vectors=file_ref(directory / VECTORS, directory),
            texts=file_ref(directory / TEXTS, directory),
        ),
        codecs=None if codecs is None else file_ref(directory / CODECS, directory),
        tools=dict(sorted(lineage.tools.items())),
    )
    _require_agreement(directory, manifest, golden)
    _write_record(directory / MANIFEST, manifest)
    (directory / _CARD).write_text(_card(directory, manifest, report, golden), encoding="utf-8", newline="\n")
    write_sums(directory)
    return manifest


def _require_agreement(directory: Path, manifest: Manifest, golden: GoldenData | GoldenImages) -> None:
    """Refuse records that do not belong together, and files or golden texts of another limit.

    Raises:
        BundleCorrupt: they are so; each disagreement is named with both values.
    """
    limit = manifest.source.max_sequence
    broken = disagreements(manifest) + disagreeing_limits(directory, manifest, reads_tokenizer=True)
    if isinstance(golden, GoldenData) and golden.input_ids.shape[1] > limit:
        broken.append(f"golden texts have up to {golden.input_ids.shape[1]} tokens, but source.max_sequence is {limit}")
    if broken:
        raise BundleCorrupt(
            f"{manifest.target.name}: what the stages gave does not belong together: {'; '.join(broken)}. Run edgeq "
            "cache purge, and export again."
        )


def _card(directory: Path, manifest: Manifest, report: ParityReport, golden: GoldenData | GoldenImages) -> str:
    """Render the model card."""
    if isinstance(golden, GoldenData):
        return render_card(manifest, report, golden.pad_id)
    from edgeq.data import image_preprocessing  # here: texts need no Pillow

    return render_card(manifest, report, 0, image_preprocessing.read(directory / image_preprocessing.CONFIG))


def _unshipped(record: FiledT) -> FiledT:
    """Give a record whose file, which is not in the bundle, is named without a folder of this machine."""
    bare: FileRef = record.file.model_copy(update={"path": Path(record.file.path).name})
    return record.model_copy(update={"file": bare})


def _without_feeds_path(record: QdqModel) -> QdqModel:
    """Give a record whose feeds for a vendor's calibration are named without a folder of this machine."""
    if record.feeds is None:
        return record
    bare = record.feeds.model_copy(update={"path": Path(record.feeds.path).name})
    return record.model_copy(update={"feeds": bare})


def _write_record(path: Path, record: Record) -> None:
    """Write a record as JSON."""
    path.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="\n")


def _copy(origin: Path, path: Path) -> None:
    """Copy a file's content to a new path of the bundle."""
    if path.exists():
        raise EdgeqError(f"{origin}: {path.name} is in the bundle already. Rename it in the model.")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(origin, path)
