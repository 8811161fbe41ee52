"""List what must lie on a device: each file of a bundle, and the device script, by sha256."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeq.bundle.checksums import SUMS, bundle_files
from edgeq.bundle.device_script import device_script
from edgeq.bundle.verify import read_whole
from edgeq.system.files import sha256_file, storage_errors


@dataclass(frozen=True)
class Blobs:
    """Hold what is to be there.

    Attributes:
        paths: for each sha256 a file of this machine.
        sizes: for each sha256 its bytes.
        files: each file of the bundle, by its name there and its sha256.
        script: the sha256 of the device script: edgeq's own, not the bundle's copy.
    """

    paths: Mapping[str, Path]
    sizes: Mapping[str, int]
    files: Sequence[tuple[str, str]]
    script: str

    @classmethod
    def of(cls, bundle: Path) -> Blobs:
        """List a whole bundle and the device script.

        Raises:
            ConfigError: there is no bundle.
            BundleCorrupt: it is damaged.
            StorageFailed: a file cannot be read.
        """
        read_whole(bundle)
        with storage_errors(f"reading {bundle}"):
            named = {**bundle_files(bundle), SUMS: bundle / SUMS}
            files = [(name, sha256_file(path)) for name, path in named.items()]
            paths = {sha256: named[name] for name, sha256 in files}
            script = sha256_file(device_script())
            paths[script] = device_script()
            return cls(paths, {sha256: path.stat().st_size for sha256, path in paths.items()}, files, script)
