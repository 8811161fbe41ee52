"""Lower an integer-only QDQ model to one .tflite file, and run it in LiteRT or tflite-runtime in a child process."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgeq.backends.contract import Plan, Rejection, Rule, has_buckets, rejected, takes_kinds
from edgeq.backends.tflite.sessions import IMAGE, SIGNATURE, TfliteImageSession, TfliteSession
from edgeq.data.batches import PIXELS
from edgeq.data.tokens import bucket_lengths
from edgeq.errors import LoweringFailed, ToolMissing, UnsupportedRange
from edgeq.records import Artifact, Placement, QdqModel, Target
from edgeq.system.environments import Environment, interpreter
from edgeq.system.files import file_ref, storage_errors, write_bytes
from edgeq.system.worker import Worker, child_command

if TYPE_CHECKING:
    from edgeq.backends.tflite.emitter import Settings
    from edgeq.backends.tflite.kernels import Contents, Operator

MODEL = "tflite/model.tflite"
_PRODUCTS = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"})

# Its wheel was built for numpy 1 and Python 3.11: it lives in an environment of its own.
TFLITE_RUNTIME = Environment("tflite-runtime", ("tflite-runtime==2.14.0", "numpy==1.26.4"), ("3.11",))

_SETTINGS = {"interpreter", "threads", "bias_bits", "upcast", "lookup"}
_CHOICES: dict[str, tuple[str | int, ...]] = {
    "interpreter": ("litert", "tflite-runtime"),
    "bias_bits": (32, 64),
    "upcast": ("quantize", "cast"),
    "lookup": ("none", "roots", "all"),
}
_CHILD = Path(__file__).with_name("child.py")


leaves_nothing_float = takes_kinds(
    ("integer",), "The scheme must be integer-only: TFLite has no kernels that mix integer products with float around "
    "them.", "leaves tensors in float",
)  # fmt: skip


def has_known_settings(model: QdqModel, target: Target) -> str | None:
    """The target's [runtime] holds interpreter, threads, bias_bits, upcast and lookup, each with a known value."""
    unknown = set(target.runtime) ^ _SETTINGS
    if unknown:
        return f"missing or unknown: {', '.join(sorted(unknown))}"
    wrong = [f"{key} is {target.runtime[key]!r}" for key, known in _CHOICES.items() if target.runtime[key] not in known]
    return "; ".join(wrong) or None


RULES: tuple[Rule, ...] = (leaves_nothing_float, has_buckets, has_known_settings)


def tools() -> Mapping[str, str]:
    """Give the versions of the .tflite schema, its writer and LiteRT.

    Raises:
        ToolMissing: ai-edge-litert is not installed.
    """
    try:
        return {name: version(name) for name in ("ai-edge-litert", "flatbuffers")}
    except PackageNotFoundError as error:
        raise ToolMissing(f'{error.name} is not installed; pip install "edgeq[tflite]"') from error


def environments() -> tuple[Environment, ...]:
    """Give the environment of tflite-runtime; `load` creates it for a target that names this interpreter."""
    return (TFLITE_RUNTIME,)


def rejections(model: QdqModel, target: Target) -> tuple[Rejection, ...]:
    """List every rule that the model or the target does not meet."""
    return rejected(RULES, model, target)


def planned(model: ir.Model, bucket: int, target: Target) -> Plan:
    """Write a QDQ model for one sequence length in memory, and hold its operators against the list of kernels."""
    _, plan = plan_of(model, bucket, settings_of(target), str(target.runtime["interpreter"]))
    return plan


def plan_of(
    model: ir.Model, bucket: int, settings: Settings, interpreter_name: str
) -> tuple[tuple[Operator, ...], Plan]:
    """Write one signature in memory; give its operators, and the reasons not to lower.

    Args:
        model: an integer-only QDQ model.
        bucket: the sequence length, in tokens.
        settings: how to write what runtimes differ in.
        interpreter_name: "litert" or "tflite-runtime", whose table of kernels counts.
    """
    from edgeq.backends.tflite import kernels
    from edgeq.backends.tflite.lowering import lower_model

    try:
        data = lower_model(model, (bucket,), settings)
    except UnsupportedRange as error:
        return (), Plan(possible=(str(error),))
    except LoweringFailed as error:
        return (), Plan(problems=(str(error),))
    contents = kernels.read(data)
    # One sentence for each kernel: how many tensors need it depends on the ranges, too.
    unknown = (kernels.unknown_kernel(operator, interpreter_name) for operator in contents.operators)
    floats = [f"{name}: a float tensor" for name in contents.float_tensors]
    return contents.operators, Plan(problems=tuple(dict.fromkeys([*floats, *filter(None, unknown)])))


def settings_of(target: Target) -> Settings:
    """Give how a target's file is written.

    Raises:
        ToolMissing: ai-edge-litert is not installed.
    """
    tools()
    from edgeq.backends.tflite.emitter import Settings

    runtime = target.runtime
    is_bias_stated = runtime["interpreter"] != "tflite-runtime"
    return Settings(
        int(runtime["bias_bits"]), str(runtime["upcast"]), str(runtime["lookup"]), is_bias_stated=is_bias_stated
    )


def lower(model: QdqModel, target: Target, out_dir: Path) -> Artifact:
    """Write `tflite/model.tflite` below `out_dir`: a signature for each bucket, weights stored once.

    Args:
        model: the integer-only QDQ model.
        target: whose buckets and runtime settings are used.
        out_dir: an existing folder.

    Returns:
        The artifact; its placement counts operators of the largest bucket, read from the finished file.

    Raises:
        ToolMissing: ai-edge-litert is not installed.
        UnsupportedRange: the scales of this calibration leave what a kernel takes.
        LoweringFailed: an ONNX operator cannot be written, or the file needs a kernel that is not in `kernels`.
        StorageFailed: the file cannot be written.
    """
    settings = settings_of(target)
    buckets = bucket_lengths(target.buckets_tokens, model.max_sequence)
    data, contents = integer_file(model, target.name, buckets, settings, str(target.runtime["interpreter"]))
    path = out_dir / MODEL
    with storage_errors(f"writing {MODEL}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    largest = signature_of(model, buckets)
    counts = Counter(item.name for item in contents.operators if item.signature == largest)
    return Artifact(
        backend=target.backend,
        target=target.name,
        files=(file_ref(path, relative_to=out_dir),),
        qdq_sha256=model.file.sha256,
        placement=Placement(
            integer_matmuls=len(model.integer_matmuls),
            float_by_scheme=(),
            float_fallbacks=(),
            operators=dict(sorted(counts.items())),
        ),
        tools=dict(tools()),
    )


def integer_file(
    model: QdqModel, name: str, buckets: Sequence[int], settings: Settings, interpreter_name: str
) -> tuple[bytes, Contents]:
    """Write a .tflite file without float tensors, and check each of its operators against the table of kernels.

    Args:
        model: the integer-only QDQ model.
        name: of the target, for messages.
        buckets: sequence lengths in tokens, each a signature.
        settings: how to write operators that differ between runtimes.
        interpreter_name: "litert" or "tflite-runtime": whose table of kernels the file is checked against.

    Raises:
        UnsupportedRange: the scales of this calibration leave what a kernel takes.
        LoweringFailed: an ONNX operator cannot be written, or the file needs a kernel that is not in `kernels`.
    """
    from edgeq.backends.tflite import kernels
    from edgeq.backends.tflite.lowering import lower_model

    data = lower_model(ir.load(model.file.path), buckets, settings)
    contents = kernels.read(data)
    problems = kernels.violations(contents, interpreter_name)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise LoweringFailed(f"{name}: the file holds what was not shown to be right:\n{listed}")
    largest, weights = signature_of(model, buckets), {f"{item}/weight/codes" for item in model.integer_matmuls}
    written = [item for item in contents.operators if item.signature == largest]
    products = sum(item.name in _PRODUCTS and not weights.isdisjoint(item.operands) for item in written)
    if products != len(model.integer_matmuls):
        raise LoweringFailed(
            f"{name}: {products} products were written, the scheme has {len(model.integer_matmuls)}; "
            "please report the model"
        )
    return data, contents


def signature_of(model: QdqModel, buckets: Sequence[int]) -> str:
    """Name the signature whose operators are counted: of images, or of the largest bucket."""
    return IMAGE if PIXELS in model.inputs else SIGNATURE.format(max(buckets))


def load(artifact: Artifact, bundle: Path, target: Target, threads: int = 0) -> TfliteSession | TfliteImageSession:
    """Load the artifact in the target's interpreter, in a child process.

    Args:
        artifact: what `lower` gave.
        bundle: the folder that its paths are relative to.
        target: buckets and runtime settings.
        threads: 0 takes the target's number.

    Raises:
        ToolMissing: the interpreter is not installed and cannot be.
        LoweringFailed: the interpreter refuses the file, or dies of it.
    """
    runtime = str(target.runtime["interpreter"])
    return open_session(bundle / artifact.files[0].path, runtime, threads or int(target.runtime["threads"]))


def open_session(path: Path, runtime: str, threads: int) -> TfliteSession | TfliteImageSession:
    """Load a .tflite file in a child process.

    Raises:
        ToolMissing: the interpreter is not installed and cannot be.
        LoweringFailed: the interpreter refuses the file, or dies of it.
    """
    python = interpreter(TFLITE_RUNTIME) if runtime == "tflite-runtime" else Path(sys.executable)
    tools()
    worker = Worker(child_command(python, _CHILD, runtime), runtime)
    loaded = worker.call(do="load", path=str(path.resolve()), threads=threads)
    if loaded["signatures"] == [IMAGE]:
        return TfliteImageSession(worker, output_params(path))
    buckets = tuple(int(name.removeprefix(SIGNATURE.format(""))) for name in loaded["signatures"])
    return TfliteSession(worker, buckets, output_params(path))


def output_params(path: Path) -> tuple[float, int]:
    """Read the scale and the zero point of the output vectors from a .tflite file."""
    from ai_edge_litert import schema_py_generated as schema

    graph = schema.Model.GetRootAsModel(path.read_bytes(), 0).Subgraphs(0)
    parameters = graph.Tensors(graph.Outputs(0)).Quantization()
    return float(parameters.Scale(0)), int(parameters.ZeroPoint(0))
