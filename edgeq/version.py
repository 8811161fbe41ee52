"""Give the version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("edgeq")
except PackageNotFoundError:  # a checkout on the path, not installed
    VERSION = "0+unknown"
