"""Validate bundles on many devices, and export for many targets, over a Ray cluster's machines or this one alone."""
