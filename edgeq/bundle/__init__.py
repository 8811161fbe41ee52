"""Write, read, verify and run the release folder of one target.

`OUT/TARGET/` holds the artifact, tokenizer, config and module files, the chain of records (`manifest.json`), the
parity report (`parity.json`), golden texts with their vectors, a model card, and `SHA256SUMS` over all of them.
"""
