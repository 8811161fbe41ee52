"""Use a Ray cluster, or this machine as one, and move folders between its machines."""

from __future__ import annotations

import io
import os
import socket
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from edgeq.errors import ConfigError, DeviceUnavailable, ToolMissing

RESTARTS = 3  # of a worker whose machine went away, each on another
_POLL_S = 1.0
_KNOCK_S = 10.0

ResultT = TypeVar("ResultT")


@contextmanager
def cluster(address: str | None) -> Iterator[Any]:
    """Give the module `ray`, connected.

    Args:
        address: host:port of a running cluster; None starts one on this machine, gone afterwards.

    Raises:
        ToolMissing: ray is not installed.
        DeviceUnavailable: there is no cluster at that address.
    """
    ray = require(address)
    own = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise DeviceUnavailable(
            f"--ray {address or 'local'}: no cluster to work on ({said(error)}). Start one with `ray start "
            "--head`, or leave --ray out to work on this machine."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def require(address: str | None) -> Any:
    """Give the module `ray`, or say what is missing before hours are spent.

    Raises:
        ConfigError: the address is none.
        ToolMissing: ray is not installed.
        DeviceUnavailable: nobody listens at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked to be counted
    try:
        import ray
    except ImportError as error:
        raise ToolMissing('ray is not installed; pip install "edgeq[lab]"') from error
    if address is not None:
        _require_listening(address)
    return ray


def _require_listening(address: str) -> None:
    """Refuse an address where nobody listens: Ray would knock for minutes.

    Raises:
        ConfigError: it is no address.
        DeviceUnavailable: nobody listens there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--ray {address!r}: is no address; HOST:PORT is needed, as `ray start` says it.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_S).close()
    except OSError as error:
        raise DeviceUnavailable(
            f"--ray {address}: no cluster to work on ({error.strerror or error}). Start one with `ray start --head`, "
            "or leave --ray out to work on this machine."
        ) from error


def gathered(
    ray: Any,
    waiting: dict[Any, ResultT],
    each: Callable[[ResultT, Any], None],
    limit_s: float,
    told: Callable[[int], None],
) -> None:
    """Take every result as it comes, once.

    Args:
        ray: the module, connected.
        waiting: reference -> what it is the result of; emptied.
        each: called with that and the result, or with the exception of Ray's that took its place.
        limit_s: how long nothing may come at all.
        told: called with how many are done.

    Raises:
        DeviceUnavailable: nothing came for so long: the cluster has no machine with a free CPU.
    """
    silent, total = 0.0, len(waiting)
    while waiting:
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=_POLL_S)
        silent = 0.0 if done else silent + _POLL_S
        if silent > limit_s:
            raise DeviceUnavailable(
                f"the cluster gave no result for {limit_s:.0f} s; {len(waiting)} of {total} are left. See `ray "
                "status`: each device here or emulated, and each export, needs a free CPU."
            )
        for reference in done:
            what = waiting.pop(reference)
            try:
                found = ray.get(reference)
            except ray.exceptions.RayError as error:
                found = error
            each(what, found)
            told(total - len(waiting))


def said(error: Exception) -> str:
    """Give the line of Ray's error that says what happened: the first, or of a traceback from elsewhere the last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if "ray::" in lines[0] else lines[0]


def packed(folders: Sequence[Path]) -> bytes:
    """Put folders, each under its own name, into one archive in memory.

    Raises:
        ConfigError: one holds a link or a device; what edgeq writes does not.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", strict_timestamps=False) as archive:
        for folder in folders:
            for path in sorted(folder.rglob("*")):
                if path.is_symlink() or not (path.is_dir() or path.is_file()):
                    raise ConfigError(f"{path}: is a link or no file; a bundle holds none. Export it again.")
                archive.write(path, f"{folder.name}/{path.relative_to(folder).as_posix()}")
    return buffer.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Write what `packed` took below a folder; no name leads out of it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)
