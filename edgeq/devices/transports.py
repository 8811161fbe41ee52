"""Choose the transport for an address: this machine, ssh, adb, or an emulated 64-bit Arm.

Every transport runs the same device script (`tools/device/validate.py`) and returns the same record, a `DeviceReport`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeq.devices.contract import DEFAULT_TIME_LIMIT_S, Job, Transport
from edgeq.devices.ssh import DEFAULT_PYTHON
from edgeq.errors import ConfigError

__all__ = ["DEFAULT_TIME_LIMIT_S", "Access", "Job", "Transport", "transport_of"]


@dataclass(frozen=True)
class Access:
    """Hold how a transport uses the machine that it reaches.

    Attributes:
        python: the Python interpreter there that has numpy and the runtime.
        native: a file here, sent to a phone without Python to run .tflite files: LiteRT's `benchmark_model`.
        is_kept: leave sent files there, so that the next run sends only changed ones.
    """

    python: str = DEFAULT_PYTHON
    native: Path | None = None
    is_kept: bool = True


def transport_of(where: str, access: Access | None = None) -> Transport:
    """Give the transport for an address: local, ssh://[user@]host[:port][/folder], adb:SERIAL or arm64.

    Raises:
        ConfigError: the address has none of these forms, or `access` names what its transport does not use.
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
    raise ConfigError(f"--on {where!r}: is no address; local, ssh://user@host[:port], adb:SERIAL or arm64 is needed.")
