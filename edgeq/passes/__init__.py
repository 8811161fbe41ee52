"""Rewrite an exported graph, one exact rewrite per file."""
