"""Export a source to a float model: FP32 ONNX with pooling and normalisation inside, proved against torch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeq import dialect, passes, source
from edgeq.errors import EdgeqError, Unsupported
from edgeq.records import FloatModel, Source
from edgeq.reference import FloatSession
from edgeq.source import Located
from edgeq.storage import file_ref, replacing
from edgeq.texts import Feeds

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

OPSET = 21
TOLERANCE = 1e-5
EXTERNAL_DATA_BYTES = 2_000_000_000  # protobuf refuses messages of 2 GiB


def export(located: Located, out_dir: Path, hidden_state: bool = True) -> tuple[Source, FloatModel]:
    """Write `model.onnx`, `source.json`, `float_model.json` and the folder `config/` below `out_dir`.

    Args:
        located: the model.
        out_dir: an existing empty folder.
        hidden_state: also give `last_hidden_state`, float32[batch, sequence, hidden], for tools that pool themselves.

    Returns:
        The records. Outputs: `sentence_embedding`, float32[batch, dim], and `last_hidden_state` if asked for.

    Raises:
        ToolMissing: torch is not installed.
        ConfigError: the model cannot be loaded.
        Unsupported: torch cannot export it, or the graph leaves the dialect.
        EdgeqError: the graph does not reproduce torch to 1e-5.
    """
    model = source.load(located)
    record = source.describe(located, model)
    vocabulary = len(model.tokenizer)
    feeds = passes.probe_feeds(vocabulary, record.max_sequence)
    raw = _to_onnx(model, hidden_state, located.name, record.max_sequence)
    rewritten, reports = passes.apply(raw, feeds)
    dialect.verify(rewritten, located.name)
    error = _distance_to_torch(model, rewritten, feeds)
    if not error <= TOLERANCE:
        raise EdgeqError(f"{located.name}: the exported graph differs from torch by {error:.2e}; at most {TOLERANCE:.0e} is allowed")
    path = out_dir / "model.onnx"
    save(rewritten, path)
    _save_config(model, out_dir / "config")
    outputs = tuple(output.name for output in rewritten.graph.output)
    float_model = FloatModel(
        file=file_ref(path),
        source_sha256=located.sha256,
        inputs=record.inputs,
        outputs=outputs,
        dim=record.dim,
        max_sequence=record.max_sequence,
        max_abs_error=error,
        passes=reports,
    )
    return record, float_model


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write one self-contained file below 2 GB, and weights in a file beside it above."""
    is_large = model.ByteSize() > EXTERNAL_DATA_BYTES
    if is_large:
        onnx.save(model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=1024)
        return
    with replacing(path) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))


def _graph_module(model: SentenceTransformer, hidden_state: bool) -> torch.nn.Module:
    import torch

    class Graph(torch.nn.Module):
        """Run every module of the model on bare tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
            features = {"input_ids": input_ids, "attention_mask": attention_mask}
            for module in self.model:
                features = module(features)
            embedding = features["sentence_embedding"]
            return (embedding, features["token_embeddings"]) if hidden_state else (embedding,)

    return Graph().eval()


def _to_onnx(model: SentenceTransformer, hidden_state: bool, name: str, max_sequence: int) -> onnx.ModelProto:
    import torch

    batch, sequence = torch.export.Dim("batch", min=1, max=65536), torch.export.Dim("sequence", min=2, max=max_sequence)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 0, 0, 0]])
    mask = (ids > 0).to(torch.int64)
    axes = {0: batch, 1: sequence}
    try:
        with torch.no_grad(), quiet():
            program = torch.onnx.export(
                _graph_module(model, hidden_state),
                (ids, mask),
                dynamo=True,
                opset_version=OPSET,
                input_names=["input_ids", "attention_mask"],
                output_names=["sentence_embedding", "last_hidden_state"][: 2 if hidden_state else 1],
                dynamic_shapes={"input_ids": axes, "attention_mask": axes},
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # the boundary to the exporter, which may raise anything
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise Unsupported(f"{name}: torch cannot export this model: {type(error).__name__}: {first}") from error
    if program is None:
        raise Unsupported(f"{name}: torch.onnx.export gave no program")
    proto = program.model_proto
    proto.producer_name, proto.producer_version = "edgeq", ""
    _strip_traces(proto)
    return proto


def _strip_traces(model: onnx.ModelProto) -> None:
    """Drop stack traces and other metadata: they hold machine paths and differ between machines."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for item in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's prints, log lines and deprecation warnings off the user's terminal."""
    root = logging.getLogger("torch.onnx")
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)


def _distance_to_torch(model: SentenceTransformer, exported: onnx.ModelProto, feeds: tuple[Feeds, ...]) -> float:
    """Give the largest absolute difference of the embeddings between ONNX Runtime and torch."""
    import torch

    session = FloatSession.of(exported)
    graph = _graph_module(model, hidden_state=False)
    worst = 0.0
    for feed in feeds:
        with torch.no_grad():
            expected: NDArray[np.float32] = graph(torch.from_numpy(feed.input_ids), torch.from_numpy(feed.attention_mask))[0].numpy()
        scale = max(1.0, float(np.abs(expected).max()))
        error = float(np.abs(expected - session(feed)).max()) / scale
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst


def _save_config(model: SentenceTransformer, folder: Path) -> None:
    """Write tokenizer, config and module files as sentence-transformers does, without the transformer's weights."""
    folder.mkdir()
    with quiet():
        model.save(str(folder), create_model_card=False)
    for pattern in ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin"):
        for path in folder.glob(pattern):
            path.unlink()
