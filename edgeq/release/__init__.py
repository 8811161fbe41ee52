"""Release bundles: one reproducible archive each, with sums, bills of materials, provenance, signatures and notes.

`DIR` holds, for each bundle, `MODEL-VERSION-TARGET.tar.zst` (or `.zip`), and of the same name `.cdx.json` (CycloneDX),
`.intoto.json` (SLSA provenance) and its device reports; `RELEASE_NOTES.md`; `SHA256SUMS` over all of it; and, with a
key, a `.minisig` beside each archive and beside `SHA256SUMS`.
"""
