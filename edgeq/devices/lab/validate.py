"""Validate bundles on a lab's devices through Ray: one bundle at a time on a device, devices in parallel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.bundle.manifest import load_manifest
from edgeq.devices.contract import Job
from edgeq.devices.lab.cluster import RESTARTS, cluster, gathered, packed, said, unpack
from edgeq.devices.lab.devices import LabDevice
from edgeq.devices.report import DeviceReport, keep_report, parse_report
from edgeq.errors import ConfigError, DeviceUnavailable, EdgeqError, ParityFailed, ToolMissing
from edgeq.records import Record
from edgeq.system.files import PREFIX, work_dir
from edgeq.system.progress import Progress

_ATTEMPTS = 3  # to reach a device
_LONGEST_PAUSE_S = 60.0
_STARTING_S = 120.0  # for Ray to start a worker
_OWN_CPU = ("local", "arm64")  # transports that use the CPU of the cluster's machine


@dataclass(frozen=True)
class Plan:
    """Hold how bundles are run on devices, and how often an unreachable device is tried.

    Attributes:
        runs: timed runs of each length.
        attempts: to reach a device.
        pause_s: before the second attempt; it doubles before each further one, up to a minute.
        ray: address of a cluster; None uses this machine.
    """

    runs: int = 50
    attempts: int = _ATTEMPTS
    pause_s: float = 2.0
    ray: str | None = None


class LabResult(Record):
    """Hold the result of one bundle on one device; without a report, `message` gives the reason."""

    bundle: str
    target: str
    device: str
    where: str
    exit_code: int  # of the error in `message`; 0 when the report says passed
    message: str
    attempts: int
    report: DeviceReport | None


def validate_all(
    bundles: Sequence[Path], devices: Sequence[LabDevice], plan: Plan, progress: Progress
) -> tuple[LabResult, ...]:
    """Validate each bundle on each device that takes its target, and write each report beside its bundle.

    Args:
        bundles: OUT/TARGET each.
        devices: from `read_devices`; every machine of the cluster must be able to reach them.
        plan: runs and attempts.
        progress: called as `progress("validate", done, total)`.

    Returns:
        One result for each pair of bundle and device, in the order of both lists.

    Raises:
        ConfigError: a path is no bundle, or no device takes a bundle's target.
        ToolMissing: ray or tenacity is not installed.
        DeviceUnavailable: there is no cluster, or it gives no results.
        StorageFailed: a report cannot be written.
    """
    targets = {bundle: load_manifest(bundle).target.name for bundle in dict.fromkeys(bundles)}
    idle = [str(bundle) for bundle, target in targets.items() if not any(device.takes(target) for device in devices)]
    if idle:
        raise ConfigError(f"no device takes {', '.join(idle)}: add its target to `targets` of a device.")
    require_tenacity()
    pairs = [(bundle, device) for bundle in targets for device in devices if device.takes(targets[bundle])]
    found: dict[tuple[Path, str], LabResult] = {}

    with cluster(plan.ray) as ray:

        def each(pair: tuple[Path, LabDevice], result: Any) -> None:
            bundle, device = pair
            found[bundle, device.name] = _kept(bundle, targets[bundle], device, result)
            if not any(other is device for _, other in waiting.values()):
                ray.kill(workers.pop(device.name))  # its CPU is another's: a lost machine's devices wait for one

        contents = {bundle: ray.put(packed([bundle])) for bundle in targets}
        workers = {device.name: _worker(ray, device, plan) for device in dict.fromkeys(device for _, device in pairs)}
        waiting = {
            workers[device.name].validate.remote(contents[bundle], bundle.resolve().name): (bundle, device)
            for bundle, device in pairs
        }
        limit = max(device.time_limit_s for device in devices) * plan.attempts * 2 + _STARTING_S
        gathered(ray, waiting, each, limit, lambda done: progress("validate", done, len(pairs)))
    return tuple(found[bundle, device.name] for bundle, device in pairs)


def require_tenacity() -> None:
    """Check that tenacity, which repeats attempts, is installed.

    Raises:
        ToolMissing: it is not.
    """
    try:
        import tenacity  # noqa: F401
    except ImportError as error:
        raise ToolMissing('tenacity is not installed; pip install "edgeq[lab]"') from error


def _worker(ray: Any, device: LabDevice, plan: Plan) -> Any:
    """Start the one worker of a device: parallel runs on a device would distort its times."""
    remote = ray.remote(Worker).options(
        num_cpus=1 if device.where in _OWN_CPU else 0, max_restarts=RESTARTS,
        max_task_retries=-1,  # each failed connection while it restarts counts as one; its restarts are bounded
        max_concurrency=1, scheduling_strategy="SPREAD",
    )  # fmt: skip
    return remote.remote(device.model_dump_json(), plan.runs, plan.attempts, plan.pause_s)


class Worker:
    """Validate bundles on one device, from a machine of the cluster."""

    def __init__(self, device: str, runs: int, attempts: int, pause_s: float) -> None:
        """Take the device as JSON, and the plan's runs and attempts."""
        self._device = LabDevice.model_validate_json(device)
        self._runs, self._attempts, self._pause_s = runs, attempts, pause_s

    def validate(self, content: bytes, name: str) -> tuple[int, str, int, str | None]:
        """Validate one bundle; give exit code, message, attempts, and the report as JSON."""
        import tenacity

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(DeviceUnavailable),
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=tenacity.wait_exponential(multiplier=self._pause_s, max=_LONGEST_PAUSE_S),
            reraise=True,
        )
        with work_dir(f"{PREFIX}lab-") as folder:
            unpack(content, folder)
            job = Job(folder / name, runs=self._runs, time_limit_s=self._device.time_limit_s)
            try:
                report = retrying(self._device.transport().validate, job)
            except EdgeqError as error:
                return error.exit_code, str(error).replace(f"{folder}/", ""), _tried(retrying), None
        return 0, "", _tried(retrying), report.model_dump_json()


def _tried(retrying: Any) -> int:
    return int(retrying.statistics["attempt_number"])


def _kept(bundle: Path, target: str, device: LabDevice, result: Any) -> LabResult:
    """Check a worker's report against the bundle, write it beside the bundle, and make the result."""
    named = {"bundle": str(bundle), "target": target, "device": device.name, "where": device.where}
    if isinstance(result, Exception):
        message = f"its worker in the cluster was lost {RESTARTS + 1} times, or died of a defect: {said(result)}"
        return LabResult(**named, exit_code=DeviceUnavailable.exit_code, message=message, attempts=1, report=None)
    exit_code, message, attempts, content = result
    report = None
    if content is not None:
        try:
            report = parse_report(content.encode(), device.name, bundle)
        except EdgeqError as error:
            return LabResult(**named, exit_code=error.exit_code, message=str(error), attempts=attempts, report=None)
        keep_report(bundle, device.name, report)
        if report.status == "failed":
            exit_code, message = ParityFailed.exit_code, " ".join(report.failures)
    return LabResult(**named, exit_code=exit_code, message=message, attempts=attempts, report=report)
