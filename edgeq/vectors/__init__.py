"""Build indexes of codes, search in them, and measure what codes and indexes lose."""
