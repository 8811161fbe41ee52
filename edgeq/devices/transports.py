"""Run an artifact where it will run: here, over ssh or adb, or on an emulated 64-bit Arm.

Each place runs the same device script (`tools/device/validate.py`) and gives back the same record, a `DeviceReport`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeq.devices.contract import DEFAULT_TIME_LIMIT_S, Job, Place
from edgeq.devices.ssh import DEFAULT_PYTHON
from edgeq.errors import ConfigError

__all__ = ["DEFAULT_TIME_LIMIT_S", "Access", "Job", "Place", "place_of"]


@dataclass(frozen=True)
class Access:
    """Say how to use a place.

    Attributes:
        python: the Python there that has numpy and the runtime.
        native: a binary of this machine's disk that runs .tflite files on a phone without Python.
        is_kept: leave sent files there, so that the next run sends only what changed.
    """

    python: str = DEFAULT_PYTHON
    native: Path | None = None
    is_kept: bool = True


def place_of(where: str, access: Access | None = None) -> Place:
    """Find the place that an address means: local, ssh://[user@]host[:port], adb:SERIAL or arm64.

    Raises:
        ConfigError: it is no such address.
    """
    from edgeq.devices.adb import Adb
    from edgeq.devices.arm64 import Arm64
    from edgeq.devices.local import Local
    from edgeq.devices.ssh import Ssh

    access = access or Access()
    if access.native is not None and not where.startswith("adb:"):
        raise ConfigError(f"--native {access.native}: is for adb:SERIAL; {where!r} runs Python. Leave it out.")
    if access.python != DEFAULT_PYTHON and where in ("local", "arm64"):
        raise ConfigError(
            f"--device-python {access.python}: is for ssh and adb; {where} has a Python of its own. Drop it."
        )
    if where == "local":
        return Local()
    if where == "arm64":
        return Arm64()
    if where.startswith("ssh://"):
        return Ssh(where, access.python, access.is_kept)
    if where.startswith("adb:"):
        return Adb(where, access.python, access.native, access.is_kept)
    raise ConfigError(f"--on {where!r}: is no place; local, ssh://user@host[:port], adb:SERIAL or arm64 is needed.")
