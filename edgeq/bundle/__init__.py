"""Write, read, verify and run a bundle: the folder with one target's artifact and its proof.

`OUT/TARGET/` holds the artifact, tokenizer, config and module files, the chain of records (`manifest.json`), the
parity report (`parity.json`), golden texts with their vectors, a model card, and `SHA256SUMS` over all of them.
"""
