"""Run the device script on this machine, in a child process."""

from __future__ import annotations

import sys

from edgeq.backends.contract import NeedsEnvironments
from edgeq.backends.registry import find
from edgeq.bundle.device_script import device_script
from edgeq.bundle.manifest import load_manifest
from edgeq.devices.child_process import validate_as
from edgeq.devices.contract import Job
from edgeq.devices.report import DeviceReport, TransportKind
from edgeq.system.environments import interpreter


class Local:
    """Reach this machine itself."""

    name = "local"
    kind: TransportKind = "local"

    def validate(self, job: Job) -> DeviceReport:
        """Run the golden inputs of a bundle in the Python here that has the runtime; see `Transport.validate`."""
        return validate_as([_python(job), device_script()], job, job.options(self.kind), self.name)


def _python(job: Job) -> str:
    """Give the Python interpreter that has the bundle's runtime: edgeq's own, or one of an environment made for it."""
    target = load_manifest(job.bundle).target
    backend = find(target.backend, str(job.bundle))
    for environment in backend.environments() if isinstance(backend, NeedsEnvironments) else ():
        if environment.name in target.runtime.values():
            return str(interpreter(environment))
    return sys.executable
