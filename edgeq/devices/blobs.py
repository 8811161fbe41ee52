"""List the files to send to a device, by sha256: each file of a bundle, and the device script."""

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
    """Hold the files that a device needs.

    Attributes:
        paths: sha256 -> a path on this machine.
        sizes: sha256 -> bytes.
        files: name in the bundle, and sha256, of each file.
        script: sha256 of edgeq's device script, which is run instead of the bundle's copy.
    """

    paths: Mapping[str, Path]
    sizes: Mapping[str, int]
    files: Sequence[tuple[str, str]]
    script: str

    @classmethod
    def of(cls, bundle: Path) -> Blobs:
        """Check a bundle, and list its files and the device script.

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
