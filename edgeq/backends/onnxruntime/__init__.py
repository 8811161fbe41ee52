"""Lower a QDQ model to one ONNX file for ONNX Runtime, and read from its optimised graph which products are integer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from edgeq.backends.contract import Rejection, Rule, rejected
from edgeq.backends.onnxruntime.joined_heads import JOINT, joined_heads
from edgeq.backends.onnxruntime.token_scales import token_scales
from edgeq.data.batches import AnyFeeds
from edgeq.data.sessions import Embeddings, Session
from edgeq.errors import ConfigError, LoweringFailed
from edgeq.graph import roles
from edgeq.graph.edit import checked
from edgeq.passes.matmul_to_gemm import matmul_to_gemm
from edgeq.records import Artifact, Placement, QdqModel, Target
from edgeq.system.files import file_ref, storage_errors, work_dir, write_bytes
from edgeq.system.host import meets
from edgeq.system.untrusted import require_confined

MODEL = "onnx/model.onnx"  # sentence-transformers and text-embeddings-inference open this name

# The operators that ONNX Runtime's optimiser writes for a MatMul, Gemm or Conv between DequantizeLinear nodes.
# MatMulNBits is for weights in blocks, and quantises what it reads to int8 by blocks inside (accuracy_level 4).
# Source: onnxruntime 1.31, core/optimizer/qdq_transformer/selectors_actions.
_INTEGER_OPERATORS = frozenset({
    "MatMulIntegerToFloat", "MatMulInteger", "MatMulNBits", "QLinearMatMul", "QGemm", "QLinearConv",
})  # fmt: skip

_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
}
_SETTINGS = {"intra_op_threads", "graph_optimization"}
_FAILURES = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


def has_unsigned_activations(model: QdqModel, target: Target) -> str | None:
    """Activations must be uint8: ONNX Runtime's int8 x int8 products are three times slower on x86."""
    return f"scheme {model.scheme.name} has int8 activations" if model.scheme.activations_signed else None


def has_dynamic_shapes(model: QdqModel, target: Target) -> str | None:
    """ONNX Runtime on a CPU takes dynamic shapes, so the target has no buckets."""
    return f"buckets_tokens is {list(target.buckets_tokens)}" if target.buckets_tokens else None


def has_known_settings(model: QdqModel, target: Target) -> str | None:
    """The target's [runtime] holds intra_op_threads and graph_optimization ("all", "extended" or "basic")."""
    unknown = set(target.runtime) ^ _SETTINGS
    if unknown:
        return f"missing or unknown: {', '.join(sorted(unknown))}"
    level = target.runtime["graph_optimization"]
    return None if level in _LEVELS else f'graph_optimization is "{level}"'


RULES: tuple[Rule, ...] = (has_unsigned_activations, has_dynamic_shapes, has_known_settings)


def tools() -> Mapping[str, str]:
    """Give the version of ONNX Runtime, which is always installed."""
    return {"onnxruntime": ort.__version__}


def rejections(model: QdqModel, target: Target) -> tuple[Rejection, ...]:
    """List every rule that the model or the target does not meet."""
    return rejected(RULES, model, target)


def lower(model: QdqModel, target: Target, out_dir: Path) -> Artifact:
    """Write `onnx/model.onnx` below `out_dir`.

    Args:
        model: the QDQ model.
        target: whose runtime settings are used to optimise the graph.
        out_dir: an existing folder.

    Returns:
        The artifact with its placement: the number of weight products that are integer in the optimised graph, and the
        names of those that are float against the scheme.

    Raises:
        LoweringFailed: ONNX Runtime refuses the model.
        StorageFailed: the file cannot be written.
    """
    path = out_dir / MODEL
    with storage_errors(f"writing {MODEL}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, flattened(Path(model.file.path)).SerializeToString(deterministic=True))
    return Artifact(
        backend=target.backend,
        target=target.name,
        files=(file_ref(path, relative_to=out_dir),),
        qdq_sha256=model.file.sha256,
        placement=placement(path, model, target),
        tools=dict(tools()),
    )


def flattened(path: Path) -> onnx.ModelProto:
    """Give the QDQ model with weight MatMuls as Gemm on [tokens, channels], and query, key and value in one product.

    Where each token has a scale of its own, the bias comes behind it, and no Gemm could add it; where weights have
    scales for blocks, ONNX Runtime computes a Gemm that adds tokens in float. MatMuls stay there.
    The model is checked, with inferred shapes.
    """
    model = ir.load(path)
    has_blocks = any("block_size" in node.attributes for node in model.graph if node.op_type == "DequantizeLinear")
    if not token_scales(model) and not has_blocks:
        matmul_to_gemm(model)
    joined_heads(model)
    return roles.strip(checked(model))


def placement(path: Path, model: QdqModel, target: Target) -> Placement:
    """Read from the graph that ONNX Runtime executes which weight products are integer."""
    with work_dir() as folder:
        optimized = folder / "optimized.onnx"
        options = _options(target)
        options.optimized_model_filepath = str(optimized)
        _load(path, options)
        graph = onnx.load(optimized).graph
    products = (node for node in graph.node if node.op_type in _INTEGER_OPERATORS)
    convolutions = _convolutions(path)
    integer = {name for node in products for name in _names(node, convolutions)}
    return Placement(
        integer_matmuls=len(integer),
        float_by_scheme=model.float_matmuls,
        float_fallbacks=tuple(name for name in model.integer_matmuls if name not in integer),
        operators=dict(sorted(Counter(node.op_type for node in graph.node).items())),
    )


def _convolutions(path: Path) -> dict[str, str]:
    """Give quantised weight -> name of its Conv: ONNX Runtime's NHWC rewrite renames the node, but not the weight."""
    graph = onnx.load(path).graph
    stored = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    convolutions = (node for node in graph.node if node.op_type == "Conv" and node.input[1] in stored)
    return {stored[node.input[1]]: node.name for node in convolutions}


def _names(node: onnx.NodeProto, convolutions: Mapping[str, str]) -> list[str]:
    """Name the products of the scheme that one integer node computes."""
    found = [convolutions[name] for name in node.input if name in convolutions]
    return found or list(node.name.split(JOINT))


def load(artifact: Artifact, bundle: Path, target: Target, threads: int = 0) -> Session:
    """Load the artifact in ONNX Runtime.

    Args:
        artifact: the result of `lower`.
        bundle: the folder that its paths are relative to.
        target: runtime settings.
        threads: intra-op threads; 0 takes the target's number.

    Raises:
        ConfigError: ONNX Runtime cannot load the file, or its external data lies outside its folder.
    """
    path = bundle / artifact.files[0].path
    require_confined(path)
    options = _options(target)
    if threads:
        options.intra_op_num_threads = threads
    try:
        return OrtSession(_load(path, options))
    except LoweringFailed as error:
        raise ConfigError(str(error)) from error


class OrtSession:
    """Run an ONNX file in ONNX Runtime."""

    def __init__(self, session: ort.InferenceSession) -> None:
        """Take a loaded session."""
        self._session = session
        self._inputs = [item.name for item in session.get_inputs()]

    def __call__(self, feeds: AnyFeeds) -> Embeddings:
        """Give the sentence embeddings, float32[batch, dim]."""
        (embeddings,) = self._session.run(["sentence_embedding"], feeds.named(self._inputs))
        return np.asarray(embeddings, np.float32)


def _options(target: Target) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = int(target.runtime["intra_op_threads"])
    options.graph_optimization_level = _LEVELS[str(target.runtime["graph_optimization"])]
    if meets(target.runs_on):
        # An x86 CPU without VNNI saturates sums of uint8 x int8 products, the target's CPU does not. This option of the
        # session makes the sums exact on a machine that stands in for the target's; it is not stored in the file.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _load(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _FAILURES as error:
        raise LoweringFailed(f"{path.name}: ONNX Runtime {ort.__version__} refuses the model: {error}") from error
