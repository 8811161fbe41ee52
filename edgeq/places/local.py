"""Run the device script here, in a process of its own."""

from __future__ import annotations

import sys

from edgeq import backends
from edgeq.backends.contract import NeedsEnvironments
from edgeq.bundle import load_manifest
from edgeq.device_report import DeviceReport, PlaceKind
from edgeq.device_script import device_script
from edgeq.environments import interpreter
from edgeq.places.contract import Job
from edgeq.places.running import validate_as


class Local:
    """This machine."""

    name = "local"
    kind: PlaceKind = "local"

    def validate(self, job: Job) -> DeviceReport:
        """Run the golden inputs of a bundle here, in the Python that has the runtime; see `Place.validate`."""
        return validate_as([_python(job), device_script()], job, job.options(self.kind), self.name)


def _python(job: Job) -> str:
    """Give the Python that has the bundle's runtime: edgeq's own, or that of an environment made for the runtime."""
    target = load_manifest(job.bundle).target
    backend = backends.find(target.backend, str(job.bundle))
    for environment in backend.environments() if isinstance(backend, NeedsEnvironments) else ():
        if environment.name in target.runtime.values():
            return str(interpreter(environment))
    return sys.executable
