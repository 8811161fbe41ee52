"""Take an embedding model to a verified integer release for a named piece of hardware.

Names are loaded when first used: `import edgeq` costs nothing but this file.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from edgeq.version import VERSION as __version__

if TYPE_CHECKING:
    from edgeq.bundle.embedder import Embedder
    from edgeq.bundle.load import load
    from edgeq.errors import (
        BundleCorrupt,
        ConfigError,
        DeviceUnavailable,
        EdgeqError,
        LoweringFailed,
        ParityFailed,
        ReleaseRefused,
        StorageFailed,
        TimedOut,
        ToolMissing,
        Unsupported,
    )
    from edgeq.pipeline.api import export
    from edgeq.pipeline.bundling import Exported
    from edgeq.vectors.index import Index, open_index

_HOMES = {
    "BundleCorrupt": "edgeq.errors",
    "ConfigError": "edgeq.errors",
    "DeviceUnavailable": "edgeq.errors",
    "EdgeqError": "edgeq.errors",
    "Embedder": "edgeq.bundle.embedder",
    "Exported": "edgeq.pipeline.export",
    "Index": "edgeq.vectors.index",
    "LoweringFailed": "edgeq.errors",
    "ParityFailed": "edgeq.errors",
    "ReleaseRefused": "edgeq.errors",
    "StorageFailed": "edgeq.errors",
    "TimedOut": "edgeq.errors",
    "ToolMissing": "edgeq.errors",
    "Unsupported": "edgeq.errors",
    "export": "edgeq.pipeline.api",
    "load": "edgeq.bundle.load",
    "open_index": "edgeq.vectors.index",
}

__all__ = [
    "BundleCorrupt",
    "ConfigError",
    "DeviceUnavailable",
    "EdgeqError",
    "Embedder",
    "Exported",
    "Index",
    "LoweringFailed",
    "ParityFailed",
    "ReleaseRefused",
    "StorageFailed",
    "TimedOut",
    "ToolMissing",
    "Unsupported",
    "__version__",
    "export",
    "load",
    "open_index",
]


def __getattr__(name: str) -> object:
    """Load a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeq' has no attribute {name!r}")
    loaded: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = loaded
    return loaded


def __dir__() -> list[str]:
    """List the public names."""
    return list(__all__)
