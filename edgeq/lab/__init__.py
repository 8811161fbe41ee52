"""Validate bundles on many devices, and export for many targets, over a Ray cluster's machines or this one alone."""

from __future__ import annotations

from edgeq.lab.devices import LabDevice, read_devices
from edgeq.lab.validating import LabResult, Plan, validate_all

__all__ = ["LabDevice", "LabResult", "Plan", "read_devices", "validate_all"]
