"""Quantise embedding vectors to codes: fit, encode, decode, and the layouts that vector stores take."""
