"""Find the files of a model's torch weights, and refuse one that is cut off; torch itself is not needed."""

from __future__ import annotations

import json
from pathlib import Path

from edgeq.errors import ConfigError

_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


def has_weights(directory: Path) -> bool:
    """Tell whether files of torch weights are directly in a folder."""
    return any(any(directory.glob(pattern)) for pattern in _PATTERNS)


def require_weights(directory: Path) -> None:
    """Refuse a model directory without torch weights, or with a safetensors file that is cut off.

    Raises:
        ConfigError: it is so.
    """
    found = [path for pattern in _PATTERNS for path in sorted(directory.rglob(pattern))]
    if not found:
        raise ConfigError(f"{directory}: no weights ({' or '.join(_PATTERNS)}); restore them from the model's origin")
    for path in found:
        if path.suffix == ".safetensors":
            _require_whole(path)


def _require_whole(path: Path) -> None:
    """Refuse a safetensors file that is shorter or longer than its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 0 < length <= size - 8 else None
        except (ValueError, RecursionError):
            header = None
    if not isinstance(header, dict):
        raise ConfigError(f"{path}: not a safetensors file, or cut off in its header; fetch it again")
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if size != 8 + length + end:
        raise ConfigError(
            f"{path}: {size} bytes, but its header asks for {8 + length + end}; the file is cut off: fetch it again"
        )
