"""Find the bundles for a parity card, and refuse bundles of different models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeq.bundle.checksums import SUMS
from edgeq.bundle.manifest import MANIFEST
from edgeq.bundle.verify import read_whole
from edgeq.data.tokens import token_limit
from edgeq.errors import ConfigError
from edgeq.records import Manifest, ParityReport


@dataclass(frozen=True)
class Found:
    """Hold an intact bundle: its name on the card, its path, and its records."""

    name: str
    path: Path
    manifest: Manifest
    report: ParityReport

    @property
    def token_limit(self) -> int:
        """Give the most tokens that the artifact takes."""
        return token_limit(self.manifest.target.buckets_tokens, self.manifest.source.max_sequence)


def collect(paths: Sequence[Path]) -> tuple[Found, ...]:
    """Read bundles, given by their paths or by the folder that holds them; hash every file of each.

    Args:
        paths: bundles, or folders of bundles.

    Raises:
        ConfigError: a path holds no bundle, or two bundles are of different models.
        BundleCorrupt: a file or a record of a bundle is damaged.
    """
    folders = list(dict.fromkeys(folder.resolve() for path in paths for folder in _bundles(path)))
    read = [(folder, *read_whole(folder)) for folder in folders]
    times = Counter(manifest.target.name for _, manifest, _ in read)
    found = tuple(
        Found(_name(folder, manifest, times[manifest.target.name] > 1), folder, manifest, report)
        for folder, manifest, report in read
    )
    _require_one_model(found)
    return found


def _bundles(path: Path) -> list[Path]:
    """Give the bundle at a path, or those in the folder; damaged ones count, and raise later."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; a bundle, or the --out of an export, is needed. Check the path.")
    if _has_records(path):
        return [path]
    below = [child for child in sorted(path.iterdir()) if child.is_dir() and _has_records(child)]
    if not below:
        raise ConfigError(
            f"{path}: holds no bundle: neither it nor a folder in it has a {MANIFEST}. "
            "Give the --out of an `edgeq export`, or bundles one by one."
        )
    return below


def _has_records(path: Path) -> bool:
    is_partial = path.name.startswith(".")  # temporary folder of an export that runs, or was killed
    return not is_partial and ((path / MANIFEST).is_file() or (path / SUMS).is_file())


def _name(folder: Path, manifest: Manifest, is_shared: bool) -> str:
    """Name a bundle after its target, with its folders where several bundles have one target."""
    target = manifest.target.name
    if not is_shared:
        return target
    return f"{target} ({folder.parent.name}/{folder.name})"


def _require_one_model(found: tuple[Found, ...]) -> None:
    """Refuse bundles of different sources, or of different float models of one source."""
    first = found[0]
    for other in found[1:]:
        sides = (first.manifest, other.manifest)
        if (
            sides[0].source.sha256 == sides[1].source.sha256
            and sides[0].float_model.file.sha256 == sides[1].float_model.file.sha256
        ):
            continue
        described = " and ".join(
            f"{item.name} is of {manifest.source.name} (source sha256 {manifest.source.sha256}, "
            f"float model sha256 {manifest.float_model.file.sha256})"
            for item, manifest in zip((first, other), sides, strict=True)
        )
        raise ConfigError(
            f"{other.path}: {described}; bundles of one float model are needed, or their vectors cannot be compared. "
            "Give the bundles of one export."
        )
