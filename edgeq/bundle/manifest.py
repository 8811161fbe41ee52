"""Read a bundle's manifest and parity report, and refuse a CPU without the flags that its target needs."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from edgeq.bundle.agreement import disagreeing_limits, disagreements
from edgeq.bundle.checksums import SUMS
from edgeq.errors import BundleCorrupt, ConfigError, Unsupported
from edgeq.records import FileRef, Manifest, ParityReport, Record, Target
from edgeq.system.host import machine, meets
from edgeq.system.untrusted import oversize, unsafe_name

MANIFEST = "manifest.json"
PARITY = "parity.json"

_MOST_RECORD_BYTES = 32 << 20

RecordT = TypeVar("RecordT", bound=Record)


def is_bundle(path: Path) -> bool:
    """Tell whether a folder is a bundle, intact or damaged: it has a manifest and SHA256SUMS."""
    return (path / MANIFEST).is_file() and (path / SUMS).is_file()


def load_manifest(path: Path) -> Manifest:
    """Read a bundle's manifest.

    Raises:
        ConfigError: there is no bundle at this path.
        BundleCorrupt: the manifest has unknown, missing or wrong keys, names a file outside the bundle, or holds
            records that do not belong together; or a file states another longest text.
    """
    if not path.exists():
        raise ConfigError(
            f"{path}: no such folder; a bundle (OUT/TARGET of an `edgeq export`) is needed. Check the path."
        )
    if not (path / MANIFEST).is_file():
        inside = [child.name for child in sorted(path.iterdir()) if is_bundle(child)] if path.is_dir() else []
        hint = f"It holds the bundles {', '.join(inside)}: name one." if inside else "Name OUT/TARGET of an export."
        raise ConfigError(f"{path}: is no bundle: {MANIFEST} is not there. {hint}")
    manifest = read_record(Manifest, path / MANIFEST)
    for ref in recorded_files(manifest):
        reason = unsafe_name(ref.path)
        if reason is not None:
            raise BundleCorrupt(
                f"{path / MANIFEST}: {ref.path[:100]} is not in the bundle but a file {reason}. "
                "Fetch or export the bundle again."
            )
    broken = disagreements(manifest) + disagreeing_limits(path, manifest, reads_tokenizer=False)
    if broken:
        raise BundleCorrupt(f"{path / MANIFEST}: the chain is broken: {'; '.join(broken)}. Export the bundle again.")
    return manifest


def recorded_files(manifest: Manifest) -> tuple[FileRef, ...]:
    """List the files of a bundle that its manifest names with a sha256."""
    codecs = () if manifest.codecs is None else (manifest.codecs,)
    return (*manifest.artifact.files, manifest.parity, manifest.golden.vectors, manifest.golden.texts, *codecs)


def load_report(path: Path) -> ParityReport:
    """Read a bundle's parity report.

    Raises:
        BundleCorrupt: it is missing, or has unknown, missing or wrong keys.
    """
    return read_record(ParityReport, path / PARITY)


def require_cpu(target: Target) -> None:
    """Refuse a CPU of the target's instruction set without the flags that it needs: it would give wrong vectors.

    Raises:
        Unsupported: flags are missing; the message names them and the targets that this machine can run.
    """
    if machine() != target.runs_on.machine:
        return
    missing = meets(target.runs_on)
    if missing:
        raise Unsupported(
            f"{target.name}: {'; '.join(missing)}; without that the vectors would be wrong. {_instead(target)}"
        )


def _instead(target: Target) -> str:
    """Name the targets of the same backend that this CPU can run."""
    from edgeq.targets import list_targets

    fit = [other.name for other in list_targets() if other.backend == target.backend and not meets(other.runs_on)]
    if not fit:
        return "`edgeq targets` lists what else there is."
    return f"Use a bundle for {' or '.join(fit)} instead: edgeq export --target {fit[0]}."


def read_record(kind: type[RecordT], path: Path) -> RecordT:
    """Read one record of a bundle from JSON.

    Raises:
        BundleCorrupt: it is missing, too large, or has unknown, missing or wrong keys; the message names file and key.
    """
    reason = oversize(path, _MOST_RECORD_BYTES)
    if reason is not None:
        raise BundleCorrupt(f"{path}: {reason}. Fetch or export the bundle again.")
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise BundleCorrupt(f"{path}: is not there. Fetch or export the bundle again.") from error
    except ValidationError as error:
        details = [f"{'.'.join(str(part) for part in item['loc']) or 'JSON'}: {item['msg']}" for item in error.errors()]
        raise BundleCorrupt(
            f"{path}: {'; '.join(details[:5])}. Fetch or export the bundle again, or use the edgeq that wrote it."
        ) from error
