"""Connect to a Ray cluster, or start one on this machine; gather results, and pack folders to send."""

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
_CONNECT_S = 10.0

ResultT = TypeVar("ResultT")


@contextmanager
def cluster(address: str | None) -> Iterator[Any]:
    """Give the module `ray`, connected to a cluster, and disconnect at the end.

    Args:
        address: host:port of a running cluster; None starts one on this machine for the time of the context.

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
    """Import `ray`, and check that a cluster listens at the address, before any long work.

    Raises:
        ConfigError: the address is malformed.
        ToolMissing: ray is not installed.
        DeviceUnavailable: no port listens at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics without consent
    try:
        import ray
    except ImportError as error:
        raise ToolMissing('ray is not installed; pip install "edgeq[lab]"') from error
    if address is not None:
        _require_listening(address)
    return ray


def _require_listening(address: str) -> None:
    """Refuse an address where no port listens: Ray itself would try for minutes.

    Raises:
        ConfigError: the address is malformed.
        DeviceUnavailable: no port listens there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"--ray {address!r}: is no address; HOST:PORT is needed, as `ray start` says it.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
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
    progress: Callable[[int], None],
) -> None:
    """Wait for the results of remote calls, and handle each as it arrives.

    Args:
        ray: the module, connected.
        waiting: reference of a call -> its subject; emptied.
        each: called with the subject and the result, or Ray's exception instead of a result.
        limit_s: the longest time without any result.
        progress: called with the number of results so far.

    Raises:
        DeviceUnavailable: no result arrived in this time: no machine of the cluster has a free CPU.
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
            progress(total - len(waiting))


def said(error: Exception) -> str:
    """Give the line of Ray's error with the reason: the first, or the last of a remote traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if "ray::" in lines[0] else lines[0]


def packed(folders: Sequence[Path]) -> bytes:
    """Pack folders, each under its name, into one zip archive in memory.

    Raises:
        ConfigError: a folder holds a link or a device, which a bundle never does.
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
    """Extract an archive of `packed` into a folder; `zipfile` lets no name lead out of it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(folder)
