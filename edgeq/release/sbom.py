"""Write a CycloneDX bill of materials for a bundle: models, data, tools, licences."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

from edgeq.errors import ToolMissing
from edgeq.records import FileRef, ImageSet, TextSet

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

    from edgeq.release.eligibility import Candidate

SUFFIX = ".cdx.json"
_NAMESPACE = uuid.UUID("a31cc7a5-8b0e-5c0f-9d1c-8a2f2ad5d1d7")  # a random namespace for serial numbers of edgeq's bills
_EPOCH = datetime(1980, 1, 1, tzinfo=UTC)  # as in the archives, so that equal bundles give equal bytes
_OWN_TEXTS = "default"  # `TextSet.origin` of the texts that edgeq ships
_OWN_LICENCE = "CC0-1.0"


def sbom(candidate: Candidate, version: str, archive: FileRef, model_licence: str | None) -> bytes:
    """Give the bill of materials of one archive as JSON; equal inputs give equal bytes.

    Args:
        candidate: the bundle.
        version: of the release.
        archive: of the bundle.
        model_licence: an SPDX expression; None where it is unknown.

    Raises:
        ToolMissing: cyclonedx-python-lib is not installed.
    """
    try:
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.output import make_outputter
        from cyclonedx.schema import OutputFormat, SchemaVersion
    except ImportError as error:
        raise ToolMissing(
            f"the bill of materials needs cyclonedx-python-lib ({error}); install: pip install 'edgeq[release]'"
        ) from error
    released = _released(candidate, version, archive, model_licence)
    parts = [*_models(candidate, model_licence), *_data(candidate), *_tools(candidate)]
    bom = Bom(
        components=parts,
        metadata=BomMetaData(component=released, timestamp=_EPOCH, tools=None),
        serial_number=uuid.uuid5(_NAMESPACE, archive.sha256),
    )
    bom.register_dependency(released, parts)
    text: str = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=2)
    return text.encode() + b"\n"


def _released(candidate: Candidate, version: str, archive: FileRef, licence: str | None) -> Component:
    """Describe the archive itself."""
    manifest = candidate.manifest
    described = f"{manifest.source.name} for {manifest.target.summary}, scheme {manifest.qdq_model.scheme.name}"
    return _component(
        archive.path, "machine-learning-model", version, archive.sha256, licence,
        {"edgeq:target": manifest.target.name, "edgeq:backend": manifest.artifact.backend}, described,
    )  # fmt: skip


def _models(candidate: Candidate, licence: str | None) -> Iterable[Component]:
    """Describe the source model, the models between, and the shipped files."""
    manifest = candidate.manifest
    source = manifest.source
    kind = {"edgeq:kind": source.kind, "edgeq:dim": str(source.dim), "edgeq:modules": ", ".join(source.modules)}
    yield _component(source.name, "machine-learning-model", None, source.sha256, licence, kind, "the model given")
    stages = {
        "the float model": manifest.float_model.file, "the equalised model": manifest.equalized_model.file,
        "the QDQ model": manifest.qdq_model.file,
    }  # fmt: skip
    for said, file in stages.items():
        yield _component(file.path, "file", None, file.sha256, licence, {}, said)
    for file in manifest.artifact.files:
        yield _component(file.path, "file", None, file.sha256, licence, {}, "shipped: loaded by the runtime")


def _data(candidate: Candidate) -> Iterable[Component]:
    """Describe the calibration, validation and golden samples."""
    sets = {"calibration data": candidate.manifest.calibration.texts, "validation data": candidate.report.texts}
    for said, given in sets.items():
        kind = {"edgeq:count": str(given.count), "edgeq:origin": given.origin}
        yield _component(said, "data", None, given.sha256, _licence_of_data(given), kind, f"{said}: {given.origin}")
    licence = _licence_of_data(candidate.report.texts)
    for file in (candidate.manifest.golden.texts, candidate.manifest.golden.vectors):
        yield _component(file.path, "data", None, file.sha256, licence, {}, "golden samples out of the validation data")


def _licence_of_data(given: TextSet | ImageSet) -> str | None:
    """Give the licence of the texts that edgeq ships; it is unknown for any others."""
    return _OWN_LICENCE if isinstance(given, TextSet) and given.origin == _OWN_TEXTS else None


def _tools(candidate: Candidate) -> Iterable[Component]:
    """Describe edgeq, and the tools that made and run the artifact."""
    tools = {**candidate.manifest.tools, **candidate.manifest.artifact.tools}
    yield _component("edgeq", "application", candidate.manifest.edgeq, None, _licence_of("edgeq", None), {}, None)
    for name, version in sorted(tools.items()):
        yield _component(name, "library", version, None, _licence_of(name, version), {}, None)


def _licence_of(name: str, version: str | None) -> str | None:
    """Give the licence that an installed distribution of the used version declares, or None."""
    try:
        found = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        return None
    if version is not None and found.version != version:
        return None
    told = found.metadata
    said = next((told[field] for field in ("License-Expression", "License") if field in told), "")
    return said if said and len(said) < 100 and "\n" not in said else None


def _component(
    name: str,
    kind: str,
    version: str | None,
    sha256: str | None,
    licence: str | None,
    properties: dict[str, str],
    description: str | None,
) -> Component:
    """Make one entry; an unknown licence is marked as not stated."""
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    told = dict(properties) if licence else {**properties, "edgeq:licence": "not stated"}
    is_package = kind in ("library", "application")
    return Component(
        name=name,
        type=ComponentType(kind),
        version=version,
        description=description,
        bom_ref=f"{kind}:{name}:{version or (sha256 or '')[:16]}:{description or ''}",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else (),
        licenses=[_licence(licence)] if licence else (),
        purl=PackageURL(type="pypi", name=name.lower(), version=version) if is_package and version else None,
        properties=[Property(name=key, value=value) for key, value in sorted(told.items())],
    )


def _licence(said: str) -> Any:
    """Make a licence of an SPDX identifier or expression, or of any other text."""
    from cyclonedx.contrib.license.factories import LicenseFactory

    return LicenseFactory().make_from_string(said)
