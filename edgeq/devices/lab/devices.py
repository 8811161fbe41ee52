"""Read a lab's list of devices from a TOML file."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path

from pydantic import Field, ValidationError

from edgeq.devices.contract import DEFAULT_TIME_LIMIT_S, Transport
from edgeq.devices.report import report_path
from edgeq.devices.ssh import DEFAULT_PYTHON
from edgeq.devices.transports import Access, transport_of
from edgeq.errors import ConfigError
from edgeq.records import Record
from edgeq.system.files import storage_errors

_LARGEST_BYTES = 1_000_000


class LabDevice(Record):
    """Hold one `[[device]]` entry: the device's name, its address, and which targets are validated on it."""

    name: str = Field(min_length=1)
    where: str  # its address, as for `edgeq validate --on`
    targets: tuple[str, ...] = ("*",)  # names, or patterns with * and ?
    python: str = DEFAULT_PYTHON
    native: Path | None = None
    time_limit_s: float = Field(default=DEFAULT_TIME_LIMIT_S, gt=0)  # for one bundle, sending files included

    def transport(self) -> Transport:
        """Give the transport to the device.

        Raises:
            ConfigError: `where` is no address.
        """
        return transport_of(self.where, Access(self.python, self.native))

    def takes(self, target: str) -> bool:
        """Tell whether bundles of a target are validated on the device."""
        return any(fnmatch.fnmatchcase(target, pattern) for pattern in self.targets)


def read_devices(path: Path) -> tuple[LabDevice, ...]:
    """Read the devices from a TOML file.

    Raises:
        ConfigError: the file or an address is malformed, or two devices have one name; every problem is listed.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; a TOML list of devices is needed: docs/guides/devices.md")
    with storage_errors(f"reading {path}"), path.open("rb") as file:
        content = file.read(_LARGEST_BYTES + 1)
    try:
        if len(content) > _LARGEST_BYTES:
            raise ValueError(f"it is larger than {_LARGEST_BYTES} bytes")
        document = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of TOML and of UTF-8, too
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    entries = document.get("device")
    if set(document) != {"device"} or not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: holds {', '.join(sorted(document)) or 'nothing'}; [[device]] entries are needed")
    devices, problems = [], []
    for number, entry in enumerate(entries, start=1):
        try:
            devices.append(LabDevice.model_validate(entry, strict=False))
        except ValidationError as error:
            problems += [f"device {number}: {_problem(item)}" for item in error.errors()]
    problems += [problem for device in devices if (problem := _wrong(device, path)) is not None]
    files = [report_path(path, device.name).name.casefold() for device in devices if _wrong(device, path) is None]
    twice = sorted({name for name in files if files.count(name) > 1})
    problems += [f"{name}: two devices would write this report; name them otherwise" for name in twice]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"{path}: no valid list of devices:\n{listed}")
    return tuple(devices)


def _problem(item: object) -> str:
    fields = item if isinstance(item, dict) else {}
    where = ".".join(str(part) for part in fields.get("loc", ())) or "the entry"
    return f"{where}: {fields.get('msg')}"


def _wrong(device: LabDevice, path: Path) -> str | None:
    """Say why a device's address or name cannot be used, or None."""
    try:
        device.transport()
        report_path(path, device.name)
    except ConfigError as error:
        return f"{device.name}: {error}"
    return None
