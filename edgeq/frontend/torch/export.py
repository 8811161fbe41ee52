"""Run the part of exporting that needs torch: load the model, save its configuration, write the raw ONNX graph.

It runs in a process of its own, `python -m edgeq.frontend.torch.export`, so that torch's memory is given back before
the graph is rewritten, and so that a crash inside torch is a message and not the end of edgeq.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeq.data.batches import PIXELS, AnyFeeds, PixelFeeds
from edgeq.data.probes import probe_feeds
from edgeq.data.tokens import Feeds
from edgeq.errors import EdgeqError, Unsupported
from edgeq.frontend import tokenizer_config
from edgeq.frontend.locate import Located, from_json
from edgeq.frontend.torch import sentence_transformers, text_towers
from edgeq.frontend.torch.errors import explain
from edgeq.frontend.torch.load import describe, load, pooling_width
from edgeq.graph import external_data, origins
from edgeq.records import Source

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

OPSET = 21
_FLAGS = {  # mode -> what its flag is called
    "cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens",
}  # fmt: skip
# The order in which sentence-transformers concatenates what flags ask for.
_FLAG_ORDER = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
RAW, PROBES, SOURCE, CONFIG, _OUTSIDE = "raw.onnx", "probes.npz", "source.json", "config", "weights"


def run(located: Located, out_dir: Path, hidden_state: bool) -> Source:
    """Write the raw graph, torch's embeddings of the probe feeds, the source record and the configuration.

    Args:
        located: the model.
        out_dir: an existing folder.
        hidden_state: also give `last_hidden_state`.

    Raises:
        ToolMissing: torch or sentence-transformers is not installed.
        ConfigError: the model cannot be loaded.
        Unsupported: torch cannot export it.
    """
    model = load(located)
    if located.takes_images:
        return _run_images(located, model, out_dir, hidden_state)
    record = describe(located, model)
    feeds = probe_feeds(len(model.tokenizer), record.max_sequence)
    _require_own_vectors(model, feeds[1], located.name)
    expected = torch_embeddings(model, feeds)
    named: dict[str, NDArray[Any]] = {}
    arrays = [(feed.input_ids, feed.attention_mask, vectors) for feed, vectors in zip(feeds, expected, strict=True)]
    for row, (ids, mask, vectors) in enumerate(arrays):
        named |= {f"{row}_0": ids, f"{row}_1": mask, f"{row}_2": vectors}
    np.savez(out_dir / PROBES, allow_pickle=False, **named)
    _save_config(model, out_dir / CONFIG)
    with external_data.outside(out_dir / _OUTSIDE):
        external_data.save(_to_onnx(model, hidden_state, located.name, record.max_sequence), out_dir / RAW)
    (out_dir / SOURCE).write_text(record.model_dump_json(), encoding="utf-8")
    return record


def _require_own_vectors(model: SentenceTransformer, feeds: Feeds, name: str) -> None:
    """Refuse a model without a mask whose vectors depend on the other texts of a batch.

    Raises:
        Unsupported: padding moves a vector.
    """
    if sentence_transformers.takes_mask(model):
        return
    length = int(feeds.attention_mask[0].sum())
    alone = Feeds(feeds.input_ids[:1, :length], feeds.attention_mask[:1, :length])
    if sentence_transformers.depends_on_padding(torch_embeddings(model, (alone, feeds))):
        raise Unsupported(
            f"{name}: the model has no input for an attention mask, and padding moves a text's vector: it would depend "
            "on the other texts of its batch. A model that takes attention_mask is needed."
        )


def _run_images(located: Located, model: SentenceTransformer, out_dir: Path, hidden_state: bool) -> Source:
    """Write the same of an image model: its configuration is its preprocessing."""
    import torch

    from edgeq.frontend.torch import vision

    (out_dir / CONFIG).mkdir()
    with quiet():
        record = vision.describe(located, model)
        feeds = vision.probes(vision.prepared_as(model, located.name, out_dir / CONFIG))
        expected = vision.embeddings(model, feeds)
    named: dict[str, NDArray[Any]] = {}
    for row, (feed, vectors) in enumerate(zip(feeds, expected, strict=True)):
        named |= {f"{row}_0": feed.pixel_values, f"{row}_2": vectors}
    np.savez(out_dir / PROBES, allow_pickle=False, **named)
    module, example = vision.graph(model, hidden_state), torch.from_numpy(feeds[-1].pixel_values)
    with torch.no_grad():
        outputs = ("sentence_embedding", "last_hidden_state")[: len(module(example))]
    with external_data.outside(out_dir / _OUTSIDE):
        external_data.save(to_onnx(module, {PIXELS: example}, outputs, located.name), out_dir / RAW)
    (out_dir / SOURCE).write_text(record.model_dump_json(), encoding="utf-8")
    return record


def _graph_module(model: SentenceTransformer, hidden_state: bool) -> torch.nn.Module:
    import torch

    class Graph(torch.nn.Module):
        """Run every module of the model on bare tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
            features = {"input_ids": input_ids, "attention_mask": attention_mask}
            if "token_type_ids" in model.tokenizer.model_input_names:
                features["token_type_ids"] = torch.zeros_like(input_ids)  # a single text is segment 0 throughout
            for module in self.model:
                features = module(features)
            embedding, hidden = features["sentence_embedding"], features.get("token_embeddings")
            return (embedding, hidden) if hidden_state and hidden is not None else (embedding,)

    return Graph().eval()


def _to_onnx(model: SentenceTransformer, hidden_state: bool, name: str, max_sequence: int) -> onnx.ModelProto:
    import torch

    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 0, 0, 0]])
    tensors = {"input_ids": ids, "attention_mask": (ids > 0).to(torch.int64)}
    graph = _graph_module(model, hidden_state)
    with torch.no_grad():
        outputs = ("sentence_embedding", "last_hidden_state")[: len(graph(*tensors.values()))]
    return to_onnx(graph, tensors, outputs, name, max_sequence)


def to_onnx(
    graph: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    name: str,
    max_sequence: int = 65536,
) -> onnx.ModelProto:
    """Export a module of bare tensors; each node keeps one sentence about where it comes from.

    Args:
        graph: takes the tensors in their order, as parameters or as one *parameter.
        tensors: input name -> an example, [batch, sequence], whose axes both become free, or images, whose batch does.
        outputs: their names.
        name: for messages.
        max_sequence: the longest sequence; of no matter for images.

    Returns:
        The graph; the weights of a large one lie where `weights.outside` puts them.

    Raises:
        Unsupported: torch cannot; the message names the line.
    """
    import torch

    batch, sequence = torch.export.Dim("batch", min=1, max=65536), torch.export.Dim("sequence", min=2, max=max_sequence)
    axes: tuple[object, ...] = tuple(
        {0: batch, 1: sequence} if tensor.ndim == 2 else {0: batch} for tensor in tensors.values()
    )
    is_open = any(item.kind is item.VAR_POSITIONAL for item in inspect.signature(graph.forward).parameters.values())
    try:
        with torch.no_grad(), quiet():
            program = torch.onnx.export(
                graph,
                tuple(tensors.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(tensors),
                output_names=list(outputs),
                dynamic_shapes=(axes,) if is_open else axes,
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # the boundary to the exporter, which may raise anything

        def line(node: str) -> str:
            return _line_of(graph, tuple(tensors.values()), (axes,) if is_open else axes, node)

        raise Unsupported(f"{name}: torch cannot export this model: {explain(error, line)}") from error
    if program is None:
        raise Unsupported(f"{name}: torch.onnx.export gave no program")
    proto = external_data.serialized(program.model)
    proto.producer_name, proto.producer_version = "edgeq", ""
    origins.keep(proto)
    return proto


def _line_of(graph: torch.nn.Module, tensors: tuple[torch.Tensor, ...], shapes: Any, node: str) -> str:
    """Trace the module again, and give the user's line that a node of the trace comes from, or nothing."""
    import torch

    try:
        with torch.no_grad(), quiet():
            traced = torch.export.export(graph, tensors, dynamic_shapes=shapes, strict=False).run_decompositions()
    except Exception:  # the boundary to the exporter, which may raise anything; the refusal stands without a line
        return ""
    return next(
        (origins.user_line(str(item.meta.get("stack_trace", ""))) for item in traced.graph.nodes if item.name == node),
        "",
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's prints, log lines and deprecation warnings off the user's terminal."""
    root = logging.getLogger("torch")
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)


def torch_embeddings(model: SentenceTransformer, feeds: tuple[Feeds, ...]) -> list[NDArray[np.float32]]:
    """Run a loaded model on each feed, and give its vectors, float32[batch, dim] each."""
    import torch

    graph = _graph_module(model, hidden_state=False)
    with torch.no_grad():
        return [
            graph(torch.from_numpy(feed.input_ids), torch.from_numpy(feed.attention_mask))[0].numpy() for feed in feeds
        ]


def _save_config(model: SentenceTransformer, folder: Path) -> None:
    """Write tokenizer, config and module files, without the transformer's weights (a Dense module keeps its own).

    Module files take the form that sentence-transformers 5 and 6 both read: 5 knows neither 6's class paths nor its
    shorter pooling configuration. Of a static table there is the tokenizer only: sentence-transformers would load the
    table with torch.
    """
    folder.mkdir()
    if sentence_transformers.is_static(model):
        text_tokenizer = model.tokenizer.backend_tokenizer
        _write_json(folder / "tokenizer.json", json.loads(text_tokenizer.to_str()) | {"post_processor": None})
        return
    with quiet():
        model.save(str(folder), create_model_card=False)
    for pattern in ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin"):
        for path in folder.glob(pattern):
            path.unlink()
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    for entry, module in zip(modules, model, strict=True):
        kind = type(module).__name__
        entry["type"] = f"sentence_transformers.models.{'Dense' if kind == 'Truncate' else kind}"
        if kind == "Pooling":
            _write_json(folder / entry["path"] / "config.json", _pooling_config(module))
    _write_json(folder / "modules.json", modules)
    tokenizer_config.mend(folder / tokenizer_config.FILE)
    if model.tokenizer.truncation_side == "left":  # tokenizer.json alone would not say so
        text_tokenizer = model.tokenizer.backend_tokenizer
        text_tokenizer.enable_truncation(model.max_seq_length, direction="left")
        _write_json(folder / "tokenizer.json", json.loads(text_tokenizer.to_str()))
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": model.max_seq_length, "do_lower_case": False})
    text_towers.save(model[0], folder)


def _pooling_config(module: torch.nn.Module) -> dict[str, object]:
    """Write the pooling modes as one flag each, and their order where flags would give another."""
    modes = sentence_transformers.modes(module)
    flags: dict[str, object] = {f"pooling_mode_{key}": name in modes for name, key in _FLAGS.items()}
    order = {} if list(modes) == [name for name in _FLAG_ORDER if name in modes] else {"pooling_mode": list(modes)}
    rest = {"include_prompt": getattr(module, "include_prompt", True), **order}
    return {"word_embedding_dimension": pooling_width(module), **flags, **rest}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_probes(path: Path) -> tuple[tuple[AnyFeeds, ...], list[NDArray[np.float32]]]:
    """Read the probe feeds and torch's embeddings of them, each float32[batch, dim]."""
    with np.load(path, allow_pickle=False) as archive:
        if "0_1" not in archive:
            count = len(archive.files) // 2
            images = tuple(PixelFeeds(archive[f"{row}_0"]) for row in range(count))
            return images, [archive[f"{row}_2"] for row in range(count)]
        count = len(archive.files) // 3
        feeds = tuple(Feeds(archive[f"{row}_0"], archive[f"{row}_1"]) for row in range(count))
        return feeds, [archive[f"{row}_2"] for row in range(count)]


def main() -> int:
    """Read the model's whereabouts as JSON from the command line, run, and print an error as JSON."""
    request = json.loads(sys.argv[1])
    located = from_json(request["located"])
    try:
        run(located, Path(request["out_dir"]), request["hidden_state"])
    except EdgeqError as error:
        sys.stdout.write(json.dumps({"error": type(error).__name__, "message": str(error)}))
        return error.exit_code
    except Exception as error:  # the boundary to the model's own code, which may raise anything
        message = f"{located.name}: running the model in torch failed: {explain(error)}"
        sys.stdout.write(json.dumps({"error": Unsupported.__name__, "message": message}))
        return Unsupported.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
