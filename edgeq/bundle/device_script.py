"""Find the device script, one Python file that needs numpy and a runtime but no edgeq, and the agent that runs it."""

from __future__ import annotations

from pathlib import Path

from edgeq.targets import data_dir

SCRIPT = "validate.py"  # its name in each bundle

_FOLDER, _AGENT = "tools/device", "agent.py"


def device_script() -> Path:
    """Give the path of edgeq's device script: in a checkout's tools/device, or in the wheel.

    Each bundle carries a copy for users without edgeq. edgeq never runs that copy: a bundle may come from anywhere, and
    its files are data to edgeq, not code.

    Raises:
        ConfigError: the installation is damaged.
    """
    return data_dir(_FOLDER) / SCRIPT


def device_agent() -> Path:
    """Give the path of the agent that stores a bundle on an ssh machine and runs the device script there.

    Raises:
        ConfigError: the installation is damaged.
    """
    return data_dir(_FOLDER) / _AGENT
