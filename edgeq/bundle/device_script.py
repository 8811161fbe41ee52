"""Find the device script: one file that needs numpy and a runtime, and nothing of edgeq."""

from __future__ import annotations

from pathlib import Path

from edgeq.targets import data_dir

SCRIPT = "validate.py"  # by this name it lies in each bundle

_FOLDER, _AGENT = "tools/device", "agent.py"


def device_script() -> Path:
    """Give edgeq's own device script: in a checkout's tools/device, or in the wheel.

    A bundle carries a copy for those without edgeq. edgeq itself runs this one: a bundle comes from elsewhere, and what
    it holds is data to edgeq, never code.

    Raises:
        ConfigError: the installation is damaged.
    """
    return data_dir(_FOLDER) / SCRIPT


def device_agent() -> Path:
    """Give the far end of ssh: what holds a bundle on a device and runs the device script there.

    Raises:
        ConfigError: the installation is damaged.
    """
    return data_dir(_FOLDER) / _AGENT
