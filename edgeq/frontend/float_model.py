"""Convert a source to a float model: FP32 ONNX with pooling and L2 normalisation inside, proved against the source."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeq import errors
from edgeq.data.batches import AnyFeeds
from edgeq.errors import EdgeqError, Unsupported
from edgeq.frontend import own_path
from edgeq.frontend.locate import Located, to_json
from edgeq.frontend.onnx.convert import Raw, convert
from edgeq.frontend.torch import convert as torch_convert
from edgeq.graph import dialect, external_data, float_noise, origins
from edgeq.graph.float_session import FloatSession
from edgeq.passes import float_passes
from edgeq.records import FloatModel, Source
from edgeq.system.files import file_ref
from edgeq.system.stage import linked

TOLERANCE = 1e-5  # between two runtimes; more where the model's own FP32 is noisier
_VECTORS = "sentence_embedding"
MODEL, CONFIG = "model.onnx", torch_convert.CONFIG
_LOG_LINES = 15


def write_float_model(located: Located, out_dir: Path, hidden_state: bool = True) -> tuple[Source, FloatModel]:
    """Write `model.onnx` and the folder `config/` below `out_dir`.

    Args:
        located: the model.
        out_dir: an existing empty folder.
        hidden_state: also give `last_hidden_state`, float32[batch, sequence, hidden], for tools that pool themselves.

    Returns:
        The records. Outputs: `sentence_embedding`, float32[batch, dim], and `last_hidden_state` if asked for.

    Raises:
        ToolMissing: torch, or for an ONNX file onnxscript, is not installed.
        ConfigError: the model cannot be loaded.
        Unsupported: torch cannot trace it, or the graph has what no target takes.
        ParityFailed: its tokens or vectors differ from those of the source's own path.
        EdgeqError: its vectors differ from those of torch, or of the ONNX file, by more than 1e-5 and 4 times the
            model's noise.
    """
    with tempfile.TemporaryDirectory(dir=out_dir) as folder, external_data.outside(Path(folder) / "weights"):
        seen = _confined(located, Path(folder) / "source")
        raw_dir = Path(folder) / "raw"
        with _told_as(located, seen):
            if seen.onnx is not None:
                raw = convert(seen, seen.onnx, out_dir / CONFIG, hidden_state)
            else:
                raw = _from_torch(seen, out_dir, raw_dir, hidden_state)
            model = _float_model(seen, raw, out_dir / MODEL)
            own_path.compare(own_path.of(seen, raw_dir), raw.source, out_dir / CONFIG, out_dir / MODEL)
            return raw.source, model


def _confined(located: Located, folder: Path) -> Located:
    """Give the same model in a folder of links to the files that its hash covers, so that no other file is read.

    The graph of an ONNX file stays where it is: it is read with the files of its weights, which the hash covers, and
    ONNX Runtime refuses weights behind a link.
    """
    if located.onnx is None:
        place = folder / located.directory.name
        linked(located.files, place)
        return replace(located, directory=place)
    file = located.onnx
    linked(file.files, folder)
    onnx_file = replace(
        file, tokenizer=folder / file.tokenizer.name, config_dir=None if file.config_dir is None else folder
    )
    return replace(located, directory=folder, onnx=onnx_file)


@contextlib.contextmanager
def _told_as(located: Located, seen: Located) -> Iterator[None]:
    """Name the model's own folder in an error that names the folder of links."""
    own = located.directory if located.onnx is None else located.onnx.tokenizer.parent
    try:
        yield
    except EdgeqError as error:
        error.args = tuple(
            item.replace(str(seen.directory), str(own)) if isinstance(item, str) else item for item in error.args
        )
        raise


def _float_model(located: Located, raw: Raw, path: Path) -> FloatModel:
    """Apply the float passes to a graph, compare its vectors with the source's, and write it."""
    rewritten, reports = float_passes.rewritten(raw.model, raw.feeds)
    name = located.display_name if located.onnx is not None else located.name
    dialect.verify(rewritten, name)
    found = dialect.islands(rewritten)
    origins.strip(rewritten)
    error = _largest_error(rewritten, raw.feeds, raw.expected)
    if not error <= TOLERANCE:
        session = FloatSession.of(rewritten)  # its own FP32: the source's would count a fault of the graph as noise
        given = [{_VECTORS: session(feed)} for feed in raw.feeds]
        noise = float_noise.noise(rewritten, raw.feeds, given, least=1.0)[_VECTORS]
        if not error <= float_noise.allowed(noise, TOLERANCE):
            raise EdgeqError(
                f"{name}: the graph differs from its source by {error:.2e}; at most "
                f"{float_noise.allowed(noise, TOLERANCE):.1e} is allowed, where its own FP32 differs from its FP64 by "
                f"{noise:.1e}. This is a defect of edgeq: please report the model"
            )
    external_data.save(rewritten, path)
    return FloatModel(
        file=file_ref(path),
        source_sha256=located.sha256,
        inputs=raw.source.inputs,
        outputs=tuple(output.name for output in rewritten.graph.output),
        dim=raw.source.dim,
        max_sequence=raw.source.max_sequence,
        max_abs_error=error,
        passes=reports,
        islands=found,
    )


def _from_torch(located: Located, out_dir: Path, raw_dir: Path, hidden_state: bool) -> Raw:
    """Trace the model in a process with torch, and read its files; the weights of a large model stay in `raw_dir`."""
    raw_dir.mkdir()
    _run_torch(located, raw_dir, hidden_state)
    record = Source.model_validate_json((raw_dir / torch_convert.SOURCE).read_bytes())
    raw = external_data.load(raw_dir / torch_convert.RAW, is_mapped=True)
    feeds, expected = torch_convert.load_probes(raw_dir / torch_convert.PROBES)
    (raw_dir / CONFIG).rename(out_dir / CONFIG)
    return Raw(record, raw, feeds, expected)


def _run_torch(located: Located, out_dir: Path, hidden_state: bool) -> None:
    """Run `edgeq.frontend.torch.convert` in a child process, and raise its error here."""
    request = json.dumps({"located": to_json(located), "out_dir": str(out_dir), "hidden_state": hidden_state})
    child = subprocess.run(
        [sys.executable, "-m", "edgeq.frontend.torch.convert", request],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if child.returncode == 0:
        return
    try:
        answer = json.loads(child.stdout.strip().splitlines()[-1])
        kind = getattr(errors, answer["error"])
    except (json.JSONDecodeError, IndexError, KeyError, AttributeError, TypeError):
        log = "\n".join(child.stderr.strip().splitlines()[-_LOG_LINES:])
        raise Unsupported(
            f"{located.name}: exporting stopped with exit code {child.returncode}; its last lines:\n{log}"
        ) from None
    raise kind(answer["message"])


def _largest_error(
    exported: onnx.ModelProto, feeds: tuple[AnyFeeds, ...], expected: list[NDArray[np.float32]]
) -> float:
    """Give the largest absolute difference to the source's embeddings, relative where their largest value exceeds 1."""
    session = FloatSession.of(exported)
    worst = 0.0
    for feed, embeddings in zip(feeds, expected, strict=True):
        scale = max(1.0, float(np.abs(embeddings).max()))
        error = float(np.abs(embeddings - session(feed)).max()) / scale
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst
