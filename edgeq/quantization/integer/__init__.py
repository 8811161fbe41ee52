"""Quantise every tensor to signed int8 or int16, for integer-only runtimes."""
