"""Measure the error of each layer for the bundles' QDQ models that the cache still holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeq.analysis import layer_errors
from edgeq.analysis.layer_errors import LayerErrors
from edgeq.bundle.float_model import cached
from edgeq.calibration.file import load
from edgeq.data.splits import evenly_spaced
from edgeq.data.tokens import Tokens
from edgeq.errors import EdgeqError
from edgeq.graph import external_data
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.records import FileRef
from edgeq.reports.bundles import Found
from edgeq.reports.contents import Layers

_MOST_TEXTS = 64  # a layer's error is a mean over thousands of tokens; more texts hardly change it


def layers(found: Sequence[Found], tokens: Tokens, cache: Path) -> tuple[Layers, ...]:
    """Measure each QDQ model once, whatever the number of bundles made from it.

    Args:
        found: the bundles.
        tokens: of the texts; evenly spaced ones of them are run.
        cache: the cache's folder.
    """
    rows = evenly_spaced(len(tokens.ids), _MOST_TEXTS)
    few = Tokens(tuple(tokens.ids[row] for row in rows), 0, tokens.pad_id)
    by_model: dict[str, list[Found]] = {}
    for item in found:
        by_model.setdefault(item.manifest.qdq_model.file.sha256, []).append(item)
    return tuple(_of_one_model(items, few, cache) for items in by_model.values())


def _of_one_model(items: Sequence[Found], tokens: Tokens, cache: Path) -> Layers:
    """Measure one QDQ model, or give the reason why it cannot be measured."""
    manifest = items[0].manifest
    scheme, names = manifest.qdq_model.scheme, tuple(item.name for item in items)
    if not QUANTIZERS[scheme.kind].writes_integers:
        reason = "the vendor's compiler makes the codes inside its own file; no QDQ model is there to be compared"
        return Layers(scheme=scheme.name, names=names, errors=None, reason=reason)
    wanted = {
        "equalised float model": manifest.equalized_model.file,
        "QDQ model": manifest.qdq_model.file,
        "calibration": manifest.calibration.file,
    }
    files = {what: cached(ref, cache) for what, ref in wanted.items()}
    missing = [_named(what, wanted[what]) for what, file in files.items() if file is None]
    equalized, qdq, statistics = files.values()
    if equalized is None or qdq is None or statistics is None:
        reason = (
            f"the cache no longer holds {', '.join(missing)}. Run the export again with edgeq {manifest.edgeq}, "
            f"without --no-cache, and then compare: {' '.join(manifest.command)}"
        )
        return Layers(scheme=scheme.name, names=names, errors=None, reason=reason)
    model = external_data.load(equalized)
    try:
        counterpart = layer_errors.counterpart(model, load(statistics), scheme)
        tensors = layer_errors.measure(
            counterpart, external_data.load(qdq), tokens, layer_errors.residual_stream(model)
        )
    except EdgeqError as error:
        return Layers(scheme=scheme.name, names=names, errors=None, reason=str(error))
    errors = LayerErrors(scheme=scheme.name, texts=len(tokens.ids), tensors=tensors)
    return Layers(scheme=scheme.name, names=names, errors=errors, reason=None)


def _named(what: str, file: FileRef) -> str:
    return f"the {what} (sha256 {file.sha256[:12]}...)"
