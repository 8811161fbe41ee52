"""Write and verify the release folder of one target.

`OUT/TARGET/` holds the artifact, tokenizer, config and module files, the chain of records (`manifest.json`), the
parity report (`parity.json`), golden texts with their vectors, a model card, and `SHA256SUMS` over all of them.
"""

from edgeq.bundle.golden import GoldenData, read_golden
from edgeq.bundle.golden_images import GoldenImages, golden_images, read_golden_images
from edgeq.bundle.manifest import is_bundle, load_manifest, load_report, require_cpu
from edgeq.bundle.verifying import Verification, read_whole, verify
from edgeq.bundle.writing import Lineage, require_place, take, write

__all__ = [
    "GoldenData",
    "GoldenImages",
    "Lineage",
    "Verification",
    "golden_images",
    "is_bundle",
    "load_manifest",
    "load_report",
    "read_golden",
    "read_golden_images",
    "read_whole",
    "require_cpu",
    "require_place",
    "take",
    "verify",
    "write",
]
