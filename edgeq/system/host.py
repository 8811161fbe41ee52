"""Describe this machine: its instruction set, its CPU's flags, and whether it meets a target's `runs_on`."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from edgeq.records import RunKind, RunsOn

# numpy's name of a CPU feature -> the kernel's name of the flag. numpy asks the CPU itself, which is right under
# user-mode emulation too, where /proc/cpuinfo shows the host's CPU.
_FLAGS = {
    "AVX2": "avx2",
    "FMA3": "fma",
    "AVX512F": "avx512f",
    "AVX512BW": "avx512bw",
    "AVX512VL": "avx512vl",
    "AVX512VNNI": "avx512_vnni",
    "ASIMD": "asimd",
    "ASIMDDP": "asimddp",
    "SVE": "sve",
}
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def machine() -> str:
    """Give the instruction set as Linux spells it: x86_64, aarch64."""
    name = platform.machine()
    return _MACHINES.get(name.lower(), name)


@cache
def cpu_flags() -> frozenset[str]:
    """Give the CPU's flags as the Linux kernel spells them."""
    return merge_flags(_numpy_features(), _kernel_flags())


def merge_flags(features: Mapping[str, bool], kernel: frozenset[str]) -> frozenset[str]:
    """Join the CPU features that numpy detects with the flags that the kernel lists.

    The kernel's flags are used only where they agree with numpy on every flag that both know: under user-mode emulation
    they are those of another CPU.

    Args:
        features: numpy's CPU features by numpy's names.
        kernel: flags of /proc/cpuinfo; empty where there is none.
    """
    known = {flag: features[name] for name, flag in _FLAGS.items() if name in features}
    own = frozenset(flag for flag, is_there in known.items() if is_there)
    agrees = all((flag in kernel) == is_there for flag, is_there in known.items() if flag.startswith(("avx", "asimd")))
    return own | kernel if kernel and agrees else own


def _numpy_features() -> Mapping[str, bool]:
    from numpy._core import _multiarray_umath  # type: ignore[attr-defined]  # numpy has no public list of them

    found: Mapping[str, bool] = _multiarray_umath.__cpu_features__
    return found


def _kernel_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def meets(runs_on: RunsOn) -> tuple[str, ...]:
    """List what this machine lacks of a target's `runs_on`, one phrase each; empty when it lacks nothing."""
    if machine() != runs_on.machine:
        return (f"the machine is {machine()}, {runs_on.machine} is needed",)
    flags = cpu_flags()
    missing = [f"the CPU lacks {flag}" for flag in runs_on.cpu_flags_all if flag not in flags]
    if runs_on.cpu_flags_any and not flags & set(runs_on.cpu_flags_any):
        missing.append(f"the CPU has none of {', '.join(runs_on.cpu_flags_any)}")
    return tuple(missing)


def run_kind(runs_on: RunsOn) -> RunKind:
    """Give the kind of a run on this machine: "device", or the target's substitute where `runs_on` is not met."""
    return runs_on.elsewhere if meets(runs_on) else "device"


def describe() -> str:
    """Name the CPU, its cores and numpy's version; the host name stays private."""
    model = platform.processor() or machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{model} ({machine()}), {os.cpu_count()} cores, numpy {np.__version__}"
