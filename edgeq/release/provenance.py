"""Write how an archive was made, as an in-toto Statement with SLSA provenance.

It names no time and no machine, so that equal bundles give equal bytes.

Source: in-toto Attestation Framework v1, spec/v1/statement.md; SLSA 1.0, spec/v1.0/provenance.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgeq.records import FileRef

if TYPE_CHECKING:
    from edgeq.release.eligibility import Candidate

SUFFIX = ".intoto.json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://slsa.dev/provenance/v1"
_BUILD_TYPE = "urn:edgeq:release:1"  # its parameters are described in docs/guides/releasing.md
_BUILDER = "urn:edgeq:cli"


def provenance(candidate: Candidate, version: str, archive: FileRef, packer: dict[str, str], own_version: str) -> bytes:
    """Give the statement about one archive as JSON.

    Args:
        candidate: the bundle.
        version: of the release.
        archive: of the bundle.
        packer: version and level of the compressor.
        own_version: of the edgeq that makes the release.
    """
    manifest = candidate.manifest
    scheme = manifest.qdq_model.scheme
    statement = {
        "_type": _STATEMENT,
        "subject": [_resource(archive)],
        "predicateType": _PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {
                    "command": list(manifest.command),
                    "model": manifest.source.name,
                    "target": manifest.target.model_dump(mode="json"),
                    "version": version,
                },
                "internalParameters": {
                    "edgeq": manifest.edgeq,
                    "packer": packer,
                    "scheme": scheme.model_dump(mode="json"),
                    "seed": manifest.calibration.seed,
                    "tools": {**manifest.tools, **manifest.artifact.tools},
                },
                "resolvedDependencies": _dependencies(candidate),
            },
            "runDetails": {
                "builder": {"id": _BUILDER, "version": {"edgeq": own_version}},
                "byproducts": [_resource(manifest.parity), _resource(manifest.golden.vectors)],
            },
        },
    }
    return (json.dumps(statement, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _dependencies(candidate: Candidate) -> list[dict[str, Any]]:
    """List name and sha256 of each input, from the source model to the shipped files."""
    manifest = candidate.manifest
    found = {
        "source": manifest.source.sha256,
        "float_model": manifest.float_model.file.sha256,
        "equalized_model": manifest.equalized_model.file.sha256,
        "calibration": manifest.calibration.file.sha256,
        "calibration_texts": manifest.calibration.texts.sha256,
        "validation_texts": candidate.report.texts.sha256,
        "qdq_model": manifest.qdq_model.file.sha256,
    }
    named = [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in found.items()]
    return named + [_resource(file) for file in manifest.artifact.files]


def _resource(file: FileRef) -> dict[str, Any]:
    return {"name": file.path, "digest": {"sha256": file.sha256}}
