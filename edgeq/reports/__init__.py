"""Show the same texts through every runtime, side by side: the parity card."""
