"""Convert a model with torch to a raw ONNX graph, the vectors of probe batches, a source record and configuration.

This is a program of its own, `python -m edgeq.frontend.torch.convert REQUEST`: its end frees torch's memory before the
graph is rewritten, and a crash inside torch becomes a message.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeq.data.batches import PIXELS, AnyFeeds, PixelFeeds
from edgeq.data.probes import probe_feeds
from edgeq.data.tokens import Feeds
from edgeq.errors import EdgeqError, Unsupported
from edgeq.frontend.locate import Located, from_json
from edgeq.frontend.torch import own_path, sentence_transformers
from edgeq.frontend.torch.configuration import write_configuration
from edgeq.frontend.torch.errors import explain
from edgeq.frontend.torch.load import make_traceable, open_model, source_of
from edgeq.frontend.torch.trace import quiet, trace
from edgeq.graph import external_data, pixels
from edgeq.records import Source

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

RAW, PROBES, SOURCE, CONFIG, _OUTSIDE = "raw.onnx", "probes.npz", "source.json", "config", "weights"


def convert(located: Located, out_dir: Path, hidden_state: bool) -> Source:
    """Write the raw graph, torch's embeddings of the probe feeds, the source record and the configuration.

    Args:
        located: the model.
        out_dir: an existing folder.
        hidden_state: also output `last_hidden_state`.

    Raises:
        ToolMissing: torch or sentence-transformers is not installed.
        ConfigError: the model cannot be loaded.
        Unsupported: a graph cannot hold the model, or torch cannot trace it.
    """
    model = open_model(located)
    if located.takes_images:
        return _convert_images(located, model, out_dir, hidden_state)
    own = own_path.of_model(model, located) if located.is_sentence_transformers else None
    make_traceable(model, located)
    record = source_of(located, model)
    own_path.write(own or own_path.of_tokenizer(model), out_dir)
    feeds = probe_feeds(len(model.tokenizer), record.max_sequence)
    _require_own_vectors(model, feeds[1], located.name)
    expected = torch_embeddings(model, feeds)
    named: dict[str, NDArray[Any]] = {}
    arrays = [(feed.input_ids, feed.attention_mask, vectors) for feed, vectors in zip(feeds, expected, strict=True)]
    for row, (ids, mask, vectors) in enumerate(arrays):
        named |= {f"{row}_0": ids, f"{row}_1": mask, f"{row}_2": vectors}
    np.savez(out_dir / PROBES, allow_pickle=False, **named)
    write_configuration(model, out_dir / CONFIG, record)
    with external_data.outside(out_dir / _OUTSIDE):
        external_data.save(_to_onnx(model, hidden_state, located.name, record.max_sequence), out_dir / RAW, True)
    (out_dir / SOURCE).write_text(record.model_dump_json(), encoding="utf-8")
    return record


def _require_own_vectors(model: SentenceTransformer, feeds: Feeds, name: str) -> None:
    """Refuse a model whose vectors depend on padding: it has no attention mask, or mixes tokens without it.

    Raises:
        Unsupported: a padded text has another vector than the text alone.
    """
    if getattr(model[0], "padded_to", 0):  # padding counts as tokens, and every text has the same length
        return
    length = int(feeds.attention_mask[0].sum())
    alone = Feeds(feeds.input_ids[:1, :length], feeds.attention_mask[:1, :length])
    if sentence_transformers.depends_on_padding(torch_embeddings(model, (alone, feeds))):
        takes_mask = sentence_transformers.takes_mask(model)
        why = "mixes padding into tokens (a convolution over them does)" if takes_mask else "has no attention mask"
        raise Unsupported(
            f"{name}: padding moves a text's vector: it would depend on the other texts of its batch, in the model "
            f"itself, too, which {why}. A model that takes attention_mask and masks padding out wherever it mixes "
            "tokens is needed."
        )


def _convert_images(located: Located, model: SentenceTransformer, out_dir: Path, hidden_state: bool) -> Source:
    """Write the same files for an image model, whose configuration is its preprocessing."""
    import torch

    from edgeq.frontend.torch import vision

    (out_dir / CONFIG).mkdir()
    with quiet():
        record = vision.source_of_images(located, model)
        how = vision.preprocessing_of(model, located.name, out_dir / CONFIG)
        feeds = vision.probes(how)
        expected = vision.embeddings(model, feeds)
    named: dict[str, NDArray[Any]] = {}
    for row, (feed, vectors) in enumerate(zip(feeds, expected, strict=True)):
        named |= {f"{row}_0": feed.pixel_values, f"{row}_2": vectors}
    np.savez(out_dir / PROBES, allow_pickle=False, **named)
    module, example = vision.graph(model, hidden_state), torch.from_numpy(feeds[-1].pixel_values)
    with torch.no_grad():
        outputs = ("sentence_embedding", "last_hidden_state")[: len(module(example))]
    with external_data.outside(out_dir / _OUTSIDE):
        traced = trace(module, {PIXELS: example}, outputs, located.name)
        pixels.note(traced, *how.factor_and_offset())
        external_data.save(traced, out_dir / RAW, True)
    (out_dir / SOURCE).write_text(record.model_dump_json(), encoding="utf-8")
    return record


def _graph_module(model: SentenceTransformer, hidden_state: bool) -> torch.nn.Module:
    import torch

    class Graph(torch.nn.Module):
        """Run all modules of a model on token ids and mask."""

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
    return trace(graph, tensors, outputs, name, max_sequence)


def torch_embeddings(model: SentenceTransformer, feeds: tuple[Feeds, ...]) -> list[NDArray[np.float32]]:
    """Run a loaded model on each batch of tokens; give the vectors, float32[batch, dim] each."""
    import torch

    graph = _graph_module(model, hidden_state=False)
    with torch.no_grad():
        return [
            graph(torch.from_numpy(feed.input_ids), torch.from_numpy(feed.attention_mask))[0].numpy() for feed in feeds
        ]


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
    """Convert the model of the JSON request on the command line; print an error as JSON."""
    request = json.loads(sys.argv[1])
    located = from_json(request["located"])
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; a model's own code downloads nothing
    try:
        convert(located, Path(request["out_dir"]), request["hidden_state"])
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
