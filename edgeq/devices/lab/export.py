"""Make the bundles of one export on a Ray cluster; the float model and calibration are made here and sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeq import errors
from edgeq.bundle.write import take
from edgeq.devices.lab.cluster import RESTARTS, cluster, gathered, packed, require, said, unpack
from edgeq.errors import DeviceUnavailable, EdgeqError
from edgeq.pipeline import export
from edgeq.pipeline.bundling import Exported, Shared, bundled
from edgeq.pipeline.request import ExportRequest
from edgeq.records import Target
from edgeq.system.cache import Cache
from edgeq.system.files import PREFIX, work_dir, write_bytes
from edgeq.system.progress import Progress

_SILENT_S = 7200.0  # one bundle of an emulated target may take long


def export_on_cluster(request: ExportRequest, progress: Progress, address: str | None) -> tuple[Exported, ...]:
    """Export as `edgeq.pipeline.export` does, with each target's bundle made on a machine of the cluster.

    Args:
        request: the options. Images must have the same path on every machine.
        progress: called as `progress(stage, done, total)`.
        address: host:port of a running cluster; None works on this machine, as many targets at once as it has cores.

    Raises:
        ToolMissing: ray is not installed.
        DeviceUnavailable: there is no cluster, or it gives no results.
        EdgeqError: any stage of the first target that fails; the bundles of the other targets are written.
    """

    def run_targets(shared: Shared, request: ExportRequest, progress: Progress) -> tuple[Exported, ...]:
        with cluster(address) as ray:
            return _run_targets(ray, shared, request, progress)

    require(address)
    return export.export(request, progress, run_targets)


def _run_targets(ray: Any, shared: Shared, request: ExportRequest, progress: Progress) -> tuple[Exported, ...]:
    """Make each target's bundle on a machine of the cluster, and write the returned bundles here."""
    found: dict[str, Exported | EdgeqError] = {}
    content = ray.put(packed([shared.floats.folder, shared.calibrated.folder]))
    scheme = None if request.scheme is None else request.scheme.read_bytes()
    is_kept = not request.cache.is_temporary
    sent = replace(request, cache=Cache(Path()), targets=())
    remote = ray.remote(_made).options(num_cpus=1, max_retries=RESTARTS, scheduling_strategy="SPREAD")
    waiting = {remote.remote(content, shared, sent, target, scheme, is_kept): target for target in request.targets}
    total = len(waiting)

    def each(target: Target, result: Any) -> None:
        found[target.name] = _written(target, result, request.out, request.overwrite)

    progress("bundles", 0, total)
    gathered(ray, waiting, each, _SILENT_S, lambda done: progress("bundles", done, total))
    for item in found.values():
        if isinstance(item, EdgeqError):
            raise item
    return tuple(item for target in request.targets if isinstance(item := found[target.name], Exported))


def _made(
    content: bytes, shared: Shared, request: ExportRequest, target: Target, scheme: bytes | None, is_kept: bool
) -> tuple[str, str, Mapping[str, bytes]]:
    """Make one bundle on a machine of the cluster: give ("", result as JSON, packed bundle and report).

    Where a stage fails, give the error's class name, its message, and no files.
    """
    cache = Cache() if is_kept else Cache.temporary()
    with work_dir(f"{PREFIX}lab-") as folder:
        unpack(content, folder / "shared")
        local = shared.at(cache, folder / "shared")
        if scheme is not None and request.scheme is not None:
            (folder / request.scheme.name).write_bytes(scheme)
            request = replace(request, scheme=folder / request.scheme.name)
        request = replace(request, cache=cache, out=folder / "out", targets=(target,))
        try:
            exported = bundled(target, local, request, lambda *_: None)
        except EdgeqError as error:
            return type(error).__name__, str(error), {}
        finally:
            cache.close()
        files = {"bundle": packed([Path(exported.path)])} if exported.path else {}
        if exported.report:
            files["report"] = Path(exported.report).read_bytes()
        return "", exported.model_dump_json(), files


def _written(target: Target, result: Any, out: Path, overwrite: bool) -> Exported | EdgeqError:
    """Write a returned bundle to OUT/TARGET, or the report of a missed gate to OUT/TARGET.parity.json."""
    if isinstance(result, Exception):
        return DeviceUnavailable(
            f"{target.name}: its machine in the cluster was lost, or died of a defect: {said(result)}"
        )
    error, content, files = result
    if error:
        kind: type[EdgeqError] = getattr(errors, error)
        return kind(content)
    exported = Exported.model_validate_json(content)
    changes = {"path": "", "report": ""}
    if "bundle" in files:
        with work_dir(f"{PREFIX}lab-") as folder:
            unpack(files["bundle"], folder)
            take(folder / target.name, out / target.name, overwrite)
        changes["path"] = str(out / target.name)
    kept = out / f"{target.name}.parity.json"
    if "report" in files:
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(kept, files["report"])
        changes["report"] = str(kept)
    else:
        kept.unlink(missing_ok=True)
    return exported.model_copy(update=changes)
