"""Measure edgeq beside its peers: the parts of `tools/bench`."""
