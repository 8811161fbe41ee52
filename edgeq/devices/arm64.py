"""Run the device script on an emulated 64-bit Arm CPU (QEMU); vectors are judged, times are not taken."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

from edgeq.bundle.device_script import device_script
from edgeq.bundle.manifest import load_manifest
from edgeq.devices.child_process import validate_as
from edgeq.devices.contract import Job
from edgeq.devices.report import DeviceReport, TransportKind
from edgeq.errors import ConfigError, ToolMissing, Unsupported
from edgeq.targets import data_dir

_RECIPE = "arm64"  # a script in tools/
_OLDER_NUMPY = "tflite-runtime"  # its wheel was built for numpy 1, which the script installs apart
_RUNTIMES = ("onnxruntime", "tflite")


class Arm64:
    """Reach a 64-bit Arm that `tools/arm64` emulates on this machine, with this machine's file system."""

    name = "arm64"
    kind: TransportKind = "arm64"

    def validate(self, job: Job) -> DeviceReport:
        """Run the golden inputs of a bundle in the emulation; see `Transport.validate`."""
        target = load_manifest(job.bundle).target
        if target.backend not in _RUNTIMES:
            raise Unsupported(
                f"{job.bundle}: needs a runtime for {target.backend}; the emulated Arm has ONNX Runtime, LiteRT and "
                "tflite-runtime. Validate it on a device."
            )
        recipe = _recipe()
        job.progress("set up the emulation", 0, 1)
        _set_up(recipe)
        job.progress("set up the emulation", 1, 1)
        older = ["--tflite-runtime"] if _OLDER_NUMPY in target.runtime.values() else []
        single = replace(job, threads=job.threads or 1)  # spinning threads starve an emulator
        options = [*single.options(self.kind), "--emulated"]
        return validate_as([recipe, "run", *older, device_script()], job, options, self.name)


def _recipe() -> Path:
    """Give the path of tools/arm64 in this checkout.

    Raises:
        ToolMissing: edgeq was installed without its tools.
    """
    try:
        recipe = data_dir("tools") / _RECIPE
    except ConfigError:
        recipe = None
    if recipe is None or not recipe.is_file():
        raise ToolMissing(
            "arm64: the emulation is set up by tools/arm64, which an installed edgeq does not carry. Use a checkout: "
            "pip install --editable . there."
        )
    return recipe


def _set_up(recipe: Path) -> None:
    """Create the emulated system where it does not exist yet.

    Raises:
        ToolMissing: the script failed; the message is its last line.
    """
    done = subprocess.run(
        [recipe, "setup"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ToolMissing(f"arm64: {last}")
