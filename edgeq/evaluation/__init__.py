"""Measure vectors against FP32's, judge them against a gate, and measure STS and retrieval."""
