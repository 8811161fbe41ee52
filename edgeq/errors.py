"""Define every error edgeq raises on purpose, with its exit code.

EdgeqError                1  a defect of ours, or a stage that failed its own verification
├── ConfigError           2  a wrong argument, file, text, target or record
├── ToolMissing           3  a toolchain is not installed; the message holds the install command
├── Unsupported           4  the model, the scheme or this CPU does not meet a written rule
│   └── UnsupportedRange  4  the ranges that were observed do not allow it; other texts may
├── LoweringFailed        5  a toolchain refused, crashed, or wrote something wrong
│   └── ChildDied         5  its process ended without a reply
├── ParityFailed          6  the artifact's vectors miss the target's gate
├── BundleCorrupt         7  a bundle's bytes or chain do not agree with its records
├── StorageFailed         8  the disk is full, read-only or not there
├── DeviceUnavailable     9  the device on which the artifact should run cannot be reached
├── TimedOut             10  a stage passed its time limit
└── ReleaseRefused       11  a bundle is not fit for a release

Ctrl-C exits with 130. Every message says where, what was found, what is needed and what to do next.
"""

from __future__ import annotations


class EdgeqError(Exception):
    """Stop a stage with a message meant for the user."""

    exit_code = 1


class ConfigError(EdgeqError):
    """Reject a wrong argument, file, text, target or record."""

    exit_code = 2


class ToolMissing(EdgeqError):
    """Name a toolchain that is not installed and the command that installs it."""

    exit_code = 3


class Unsupported(EdgeqError):
    """Refuse a model, scheme or CPU that does not meet a written rule."""

    exit_code = 4


class UnsupportedRange(Unsupported):
    """Refuse what the ranges of this calibration, not the model's structure, do not allow."""


class LoweringFailed(EdgeqError):
    """Report a toolchain that refused, crashed, or wrote something wrong."""

    exit_code = 5


class ChildDied(LoweringFailed):
    """Report a toolchain whose process ended without a reply."""


class ParityFailed(EdgeqError):
    """Report vectors that miss the target's gate."""

    exit_code = 6


class BundleCorrupt(EdgeqError):
    """Name the file of a bundle that does not agree with its records."""

    exit_code = 7


class StorageFailed(EdgeqError):
    """Report a disk that is full, read-only or not there."""

    exit_code = 8


class DeviceUnavailable(EdgeqError):
    """Report a device that cannot be reached."""

    exit_code = 9


class TimedOut(EdgeqError):
    """Report a stage that passed its time limit."""

    exit_code = 10


class ReleaseRefused(EdgeqError):
    """Refuse to release a bundle."""

    exit_code = 11


def error_of(exit_code: int) -> type[EdgeqError] | None:
    """Give the class of error that has an exit code, or None."""
    kinds: tuple[type[EdgeqError], ...] = (EdgeqError, *EdgeqError.__subclasses__())
    return next((kind for kind in kinds if kind.exit_code == exit_code), None)
