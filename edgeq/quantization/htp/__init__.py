"""Quantise every tensor to uint8 or uint16, for Hexagon's tensor processor."""
