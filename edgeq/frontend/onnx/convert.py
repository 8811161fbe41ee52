"""Convert an ONNX file that the user exported to a raw float model, as `frontend.torch.convert` does with a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.data.batches import AnyFeeds
from edgeq.data.probes import probe_feeds
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import Feeds
from edgeq.errors import ConfigError, EdgeqError, Unsupported
from edgeq.frontend import settings
from edgeq.frontend.locate import POOLING_MODES, Located
from edgeq.frontend.onnx import configuration, read
from edgeq.frontend.onnx.find import OnnxFile
from edgeq.frontend.onnx.foreign_inputs import MASK
from edgeq.frontend.onnx.fused_operators import expand_fused
from edgeq.frontend.onnx.interface import (
    EMBEDDING,
    HIDDEN,
    Inputs,
    Outputs,
    drop_index_casts,
    free_name,
    outputs,
    roles,
    take_tokens,
)
from edgeq.frontend.onnx.pooling_heads import Head, HeadWriter, read_head
from edgeq.frontend.onnx.session import GivenSession
from edgeq.graph.dialect import OPSET
from edgeq.graph.edit import dims, infer_shapes
from edgeq.records import Source
from edgeq.system.files import work_dir

NARROW_TOLERANCE = 2e-2  # FP16 arithmetic against the same weights in FP32, of the largest value
_PADDING_TOLERANCE = 1e-4
_LONGEST_PROBE = 2048

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Raw:
    """Hold a graph with the inputs and outputs of a float model, probe batches, and the source's vectors of them."""

    source: Source
    model: onnx.ModelProto
    feeds: tuple[AnyFeeds, ...]
    expected: list[FloatArray]


def convert(located: Located, file: OnnxFile, config_dir: Path, hidden_state: bool) -> Raw:
    """Read a file, convert it to FP32 and the dialect's opset, expand fused operators, append pooling; write files.

    Args:
        located: the model.
        file: its ONNX file.
        config_dir: for tokenizer and configuration; does not exist yet.
        hidden_state: also output `last_hidden_state`, where sentence-transformers can open the bundle.

    Raises:
        ConfigError: the file, its tokenizer or the options do not belong together.
        ToolMissing: onnxscript is not installed.
        Unsupported: a float model cannot hold the graph.
    """
    name = file.name
    given = read.read(file.path)
    inputs = roles(given, name)
    found = outputs(given, located.pooling, name)
    head = _head(located, file, found)
    words = Tokenizer.from_file(file.tokenizer, file.max_sequence).vocabulary
    feeds = probe_feeds(words, file.max_sequence)
    _refuse_weights_of_words(given, found, words, name)
    expected = _expected(file, given, inputs, found, head, feeds)
    model = read.convert_opset(given, name)
    expand_fused(model, name)
    take_tokens(model, inputs)
    width = _take_vectors(model, found, head, hidden_state and configuration.opens_in_sentence_transformers(file, head))
    model = _with_shapes(model)
    drop_index_casts(model)
    proto = ir.to_proto(read.fold(model, name))
    proto.producer_name, proto.producer_version = "edgeq", ""
    configuration.write_configuration(file, head, width, config_dir)
    dim = int(expected[0].shape[1])
    return Raw(_source(located, file, head, found, dim), proto, feeds, expected)


def _refuse_weights_of_words(given: ir.Model, found: Outputs, words: int, name: str) -> None:
    """Refuse an output with a number for each word of the vocabulary, as a masked-LM head and SPLADE give.

    Raises:
        Unsupported: the output is such.
    """
    wanted = found.embedding or found.hidden
    width = next((dims(value) or [None])[-1] for value in given.graph.outputs if value.name == wanted)
    if width == words:
        raise Unsupported(
            f"{name}: its output {wanted} has {width} numbers, as many as the tokenizer has words: those are weights "
            "of words (a masked-LM head, a sparse encoder), and no dense vector of a text. Export the encoder without "
            "its head."
        )


def _source(located: Located, file: OnnxFile, head: Head, found: Outputs, dim: int) -> Source:
    prompts, default = configuration.prompts(file)
    told = settings.read(file.config_dir, is_onnx=True) if file.config_dir is not None else settings.Settings()
    told.require_within(file.max_sequence, file.name)
    modules = head.modules if found.embedding is None else (*(("Normalize",) if head.normalize else ()),)
    return Source(
        name=located.display_name, kind=file.kind, sha256=located.sha256, modules=("Onnx", *modules),
        inputs=("input_ids", "attention_mask"), dim=dim, max_sequence=file.max_sequence, prompts=prompts,
        default_prompt_name=default if default in prompts else None, query_length=told.query_length,
        document_length=told.document_length, unused_settings=told.unused,
    )  # fmt: skip


def _head(located: Located, file: OnnxFile, found: Outputs) -> Head:
    """Decide which modules follow the file's output: those of modules.json, or those of the options.

    Raises:
        ConfigError: the options contradict modules.json, or the pooling is missing.
    """
    given = Head((), (), False)
    if located.is_sentence_transformers and file.config_dir is not None:
        given = read_head(file.config_dir)
        if file.normalize is not None and found.embedding is None:
            raise ConfigError(
                f"{file.config_dir}: modules.json says how vectors are made; drop --normalize, or give --pooling with "
                "--tokenizer, where the folder is the tokenizer's alone"
            )
    elif located.pooling is not None:
        given = Head(tuple(located.pooling.split("+")), (), bool(file.normalize))
    if found.embedding is not None:
        return replace(given, normalize=bool(file.normalize))
    if not given.modes:
        raise ConfigError(
            f"{file.name}: gives token vectors ({found.hidden}) and does not say how they become one vector; give "
            f"--pooling with one of {', '.join(POOLING_MODES)}, and --normalize if the vectors are to have length 1"
        )
    return given


def _expected(
    file: OnnxFile, given: ir.Model, inputs: Inputs, found: Outputs, head: Head, feeds: tuple[Feeds, ...]
) -> list[FloatArray]:
    """Run the file on the probe batches; of an FP16, BF16 or FP64 file run the FP32 form, and compare the two.

    `given` is converted to FP32.
    """
    head = head if found.embedding is None else replace(head, modes=(), dense=())
    if not read.is_narrow(given):
        session = GivenSession(file.path, inputs, found, head)
        _check_range(session, file, inputs)
        return [session(feed) for feed in feeds]
    read.widen(given)
    with work_dir() as folder:
        path = folder / file.path.name
        ir.save(given, path, external_data=f"{path.name}.data")
        widened = GivenSession(path, inputs, found, head)
    _check_range(widened, file, inputs)
    expected = [widened(feed) for feed in feeds]
    try:
        narrow = GivenSession(file.path, inputs, found, head)
    except ConfigError:  # bfloat16: ONNX Runtime has no such kernels on a CPU; the weights' values are the same
        return expected
    pairs = zip(feeds, expected, strict=True)
    error = max(float(np.abs(narrow(feed) - wide).max() / np.abs(wide).max()) for feed, wide in pairs)
    if not error <= NARROW_TOLERANCE:
        raise Unsupported(
            f"{file.name}: with its weights in FP32 its vectors move by {error:.1e} of their largest value; at "
            f"most {NARROW_TOLERANCE:g} is allowed. Its own arithmetic seems to overflow: export the model in FP32."
        )
    return expected


def _check_range(session: GivenSession, file: OnnxFile, inputs: Inputs) -> None:
    """Run the longest text, and refuse a file in which padding changes a vector.

    Raises:
        ConfigError: ONNX Runtime cannot run it.
        Unsupported: a padded text has another vector than the text alone.
    """
    length = min(file.max_sequence, _LONGEST_PROBE)
    ids = np.ones((1, length), np.int64)
    session(Feeds(ids, ids))
    short, mask = np.array([[1, 2, 3, 0, 0, 0]]), np.array([[1, 1, 1, 0, 0, 0]])
    alone = session(Feeds(short[:, :3], mask[:, :3]))
    error = float(np.abs(session(Feeds(short, mask)) - alone).max() / max(1.0, np.abs(alone).max()))
    if not error <= _PADDING_TOLERANCE:
        remedy = "Export the model again with attention_mask as an input."
        if MASK in inputs.roles.values():
            remedy = "It has an attention mask among its inputs: let it mask padding out everywhere."
        raise Unsupported(
            f"{file.name}: padding moves its vectors by {error:.1e}: a text's vector would depend on its batch. "
            f"{remedy}"
        )


def _take_vectors(model: ir.Model, found: Outputs, head: Head, has_hidden: bool) -> int:
    """Make `sentence_embedding`, and `last_hidden_state` if wanted, the outputs; return the width of token vectors."""
    graph = model.graph
    named = {str(value.name): value for value in graph.outputs}
    mask = next(value for value in graph.inputs if value.name == MASK)
    hidden = named[found.hidden] if found.hidden is not None else None
    if found.embedding is not None:
        vectors = named[found.embedding]
        if head.normalize:
            vectors = HeadWriter(graph, vectors, mask).unit(vectors)
    elif hidden is not None:
        vectors = HeadWriter(graph, hidden, mask).write(head)
    else:
        raise EdgeqError("a file without output was let through. This is a defect of edgeq: please report the file")
    graph.outputs.clear()
    for value, name in ((vectors, EMBEDDING), (hidden, HIDDEN)):
        if value is None or (name == HIDDEN and not has_hidden):
            continue
        if value.producer() is None or any(value is other for other in graph.outputs):
            raise EdgeqError(f"the output {name} is no node's; this is a defect of edgeq: please report the file")
        if value.name != name:
            free_name(graph, name)
        value.name, value.dtype = name, ir.DataType.FLOAT
        graph.outputs.append(value)
    width = (dims(hidden) or [0])[-1]
    return width if isinstance(width, int) else 0


def _with_shapes(model: ir.Model) -> ir.Model:
    """Infer all shapes again: those of the file use its own names of axes."""
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    proto = ir.to_proto(model)
    if proto.opset_import[0].version != OPSET:
        raise EdgeqError(f"opset {proto.opset_import[0].version} is left after converting; this is a defect of edgeq")
    return ir.from_proto(infer_shapes(proto))
