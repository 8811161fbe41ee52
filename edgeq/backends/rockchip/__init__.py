"""Lower an equalised float model with Rockchip's toolkit to .rknn files, one for each bucket, and run its simulator.

The compiler crashes on QDQ models, so it gets the float model and the calibration's feeds, and quantises itself. The
simulator runs only models built in the same process: loading builds the files again, and compares them with the
bundle's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.backends.contract import Rejection, Rule, has_buckets, reads_tokens, rejected, takes_kinds
from edgeq.backends.rockchip import compiler_log
from edgeq.data.batches import AnyFeeds
from edgeq.data.sessions import Embeddings, embed_by_bucket
from edgeq.data.tokens import bucket_lengths, fitted
from edgeq.errors import BundleCorrupt, LoweringFailed
from edgeq.graph.static_shapes import fix_shapes
from edgeq.records import Artifact, HostOperator, Placement, QdqModel, Target
from edgeq.system.cache import log_path
from edgeq.system.child_server import pack
from edgeq.system.environments import Environment, require_interpreter
from edgeq.system.files import file_ref, replacing_dir, storage_errors, work_dir
from edgeq.system.worker import Worker, child_command, unpack_reply

FOLDER = "rockchip"
COMPILED, MODEL, FEEDS = "model_seq_{}.rknn", "model.onnx", "feeds.json"
LOGS = "rockchip-logs"  # their kind in `edgeq cache`

# The toolkit pins a torch of 2024, whose Linux wheels contain CUDA; a newer torch works, but pip must not compare pins.
TOOLKIT = Environment(
    "rknn-toolkit2",
    (
        "torch==2.13.0", "numpy==1.26.4", "onnx==1.18.0", "onnxruntime==1.23.2", "protobuf==4.25.4", "psutil==7.0.0",
        "ruamel.yaml==0.18.14", "scipy==1.15.3", "tqdm==4.67.1", "opencv-python-headless==4.11.0.86",
        "fast-histogram==0.14", "setuptools==80.9.0",
    ),
    ("3.11",),
    forced=("rknn-toolkit2==2.5.0",),
)  # fmt: skip

# Source: rknn-toolkit2 2.5.0, `help(RKNN.config)`: the SoCs with 16-bit floating point on their NPU.
_PLATFORMS = ("rk3562", "rk3566", "rk3568", "rk3576", "rk3588")

_SETTINGS = {"platform"}
_TIME_LIMIT_S = 1800.0
_DIFFERING_MAX = 0.01  # ratio of bytes between two builds of a file: the compiler writes uninitialised memory into it
_CHILD = Path(__file__).with_name("child.py")


leaves_quantising_to_vendor = takes_kinds(
    ("vendor",), "The scheme must leave quantising to a vendor's compiler: Rockchip's takes no QDQ model.",
    "quantises the model itself",
)  # fmt: skip


def has_known_settings(model: QdqModel, target: Target) -> str | None:
    """[runtime] holds platform, a SoC that rknn-toolkit2 knows and whose NPU has 16-bit floating point."""
    unknown = set(target.runtime) ^ _SETTINGS
    if unknown:
        return f"missing or unknown: {', '.join(sorted(unknown))}"
    platform = target.runtime["platform"]
    return None if platform in _PLATFORMS else f'platform is "{platform}"; known are {", ".join(_PLATFORMS)}'


RULES: tuple[Rule, ...] = (reads_tokens, leaves_quantising_to_vendor, has_buckets, has_known_settings)


def environments() -> tuple[Environment, ...]:
    """Give the environment of the toolkit; it takes a gigabyte, so only `edgeq doctor --install` creates it."""
    return (TOOLKIT,)


def tools() -> Mapping[str, str]:
    """Give the version of the toolkit.

    Raises:
        ToolMissing: its environment does not exist.
    """
    require_interpreter(TOOLKIT)
    return {name: TOOLKIT.pins[name] for name in ("rknn-toolkit2", "onnx", "numpy", "torch")}


def rejections(model: QdqModel, target: Target) -> tuple[Rejection, ...]:
    """List every rule that the model or the target does not meet."""
    return rejected(RULES, model, target)


def lower(model: QdqModel, target: Target, out_dir: Path) -> Artifact:
    """Write `rockchip/model_seq_N.rknn` for each bucket N below `out_dir`, with their source model and feeds.

    Args:
        model: the equalised float model as the compiler reads it, and the calibration's feeds.
        target: whose SoC and buckets are used.
        out_dir: an existing folder.

    Returns:
        The artifact; its placement counts the operators of the longest bucket, and names those left to the host.

    Raises:
        ToolMissing: the toolkit's environment is not there.
        LoweringFailed: the compiler refuses or dies; the message holds its errors and the path of its log.
        TimedOut: it does not end.
        StorageFailed: a file cannot be written.
    """
    versions = dict(tools())
    buckets = sorted(bucket_lengths(target.buckets_tokens, model.max_sequence), reverse=True)
    inputs = {MODEL: Path(model.file.path)} | ({FEEDS: Path(model.feeds.path)} if model.feeds is not None else {})
    hosts: list[HostOperator] = []
    logs = []
    with replacing_dir(out_dir / FOLDER) as folder, _worker() as child:
        for name, path in inputs.items():
            (folder / name).write_bytes(path.read_bytes())
        for bucket in buckets:
            name = COMPILED.format(bucket)
            logs.append(_build(child, folder, folder / name, bucket, target, model.integer_matmuls))
            hosts += [
                HostOperator(file=f"{FOLDER}/{name}", operator=item.kind, output=item.name, reason="the compiler's own")
                for item in compiler_log.operators(logs[-1])
                if item.processor != "NPU"
            ]
    floats = _floats(onnx.load(model.file.path), model.integer_matmuls, logs)
    names = [*(COMPILED.format(bucket) for bucket in buckets), *inputs]
    return Artifact(
        backend=target.backend,
        target=target.name,
        files=tuple(file_ref(out_dir / FOLDER / name, relative_to=out_dir) for name in names),
        qdq_sha256=model.file.sha256,
        placement=Placement(
            integer_matmuls=len(model.integer_matmuls) - len(floats), float_by_scheme=model.float_matmuls,
            float_fallbacks=floats, host_operators=tuple(hosts),
            operators=dict(sorted(Counter(item.kind for item in compiler_log.operators(logs[0])).items())),
        ),
        tools=versions,
    )  # fmt: skip


def load(artifact: Artifact, bundle: Path, target: Target, threads: int = 0) -> RockchipSession:
    """Build the bundle's files again in a child process, whose simulator then runs them.

    Args:
        artifact: the result of `lower`.
        bundle: the folder that its paths are relative to.
        target: SoC and buckets.
        threads: ignored; the simulator chooses.

    Raises:
        ToolMissing: the toolkit's environment is not there.
        BundleCorrupt: building again gives another file than the bundle's.
        LoweringFailed: the compiler refuses or dies.
    """
    tools()
    child = _worker()
    with storage_errors("reading the bundle"):
        model = onnx.load(bundle / FOLDER / MODEL)
    integer = [name for name in _weights(model) if name not in artifact.placement.float_by_scheme]
    built: dict[int, str] = {}
    with work_dir() as folder:
        for path in (bundle / ref.path for ref in artifact.files if ref.path.endswith(".rknn")):
            bucket, again = int(path.stem.rpartition("_")[2]), folder / path.name
            _build(child, path.parent, again, bucket, target, integer)
            differing = _differing(path, again)
            if differing > _DIFFERING_MAX:
                child.close()
                raise BundleCorrupt(
                    f"{path}: building {path.parent / MODEL} again gives another file: {differing:.1%} of the bytes "
                    f"differ, at most {_DIFFERING_MAX:.0%} may. Fetch or export the bundle again."
                )
            built[bucket] = _source(again, bucket)
    return RockchipSession(child, built)


def _differing(first: Path, second: Path) -> float:
    """Give the ratio of bytes in which two files differ; 1.0 for files of different lengths."""
    with storage_errors(f"comparing {first.name}"):
        one, other = (np.fromfile(path, np.uint8) for path in (first, second))
    return float(np.mean(one != other)) if len(one) == len(other) else 1.0


def _worker() -> Worker:
    command = child_command(require_interpreter(TOOLKIT), _CHILD)
    return Worker(command, f"rknn-toolkit2 {TOOLKIT.pins['rknn-toolkit2']}", time_limit_s=_TIME_LIMIT_S)


def _source(output: Path, bucket: int) -> str:
    """Give the path of the static model that an output is built from; the compiler stores this path in the output."""
    return str(output.parent / f"seq_{bucket}.onnx")


def _build(child: Worker, inputs: Path, output: Path, bucket: int, target: Target, integer: Sequence[str]) -> str:
    """Build one bucket from the model and the feeds in a folder, and give the compiler's log.

    Raises:
        LoweringFailed: the compiler refuses or dies.
    """
    fixed, log = Path(_source(output, bucket)), log_path(LOGS, target.name, f"seq_{bucket}")
    model = fix_shapes(ir.load(inputs / MODEL), bucket)
    feeds = _feeds(inputs / FEEDS, bucket) if (inputs / FEEDS).is_file() else None
    with storage_errors(f"writing {fixed.name}"):
        fixed.write_bytes(model.SerializeToString(deterministic=True))
    try:
        child.call(
            do="build", model=str(fixed), platform=target.runtime["platform"], integer=list(integer), log=str(log),
            output=str(output), feeds=None if feeds is None else [[pack(array) for array in pair] for pair in feeds],
        )  # fmt: skip
    except LoweringFailed as error:
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        raise LoweringFailed(
            f"{target.name}: compiling for {bucket} tokens failed: {error}\nThe compiler says:\n"
            f"{compiler_log.complaints(text)}\nAll of it lies in {log}."
        ) from error
    finally:
        fixed.unlink(missing_ok=True)
    return log.read_text(encoding="utf-8", errors="replace")


def _feeds(path: Path, bucket: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Read ids and mask of each calibration text, int64[1, bucket], cut or padded."""
    rows = [np.array([ids[:bucket]], np.int64) for ids in json.loads(path.read_bytes())]
    return [(fitted(ids, bucket), fitted(np.ones_like(ids), bucket)) for ids in rows]


def _weights(model: onnx.ModelProto) -> dict[str, str]:
    """Give name of a weight MatMul -> name of its weight."""
    stored = {tensor.name for tensor in model.graph.initializer}
    products = (node for node in model.graph.node if node.op_type == "MatMul")
    return {node.name: node.input[1] for node in products if node.input[1] in stored}


def _floats(model: onnx.ModelProto, integer: Sequence[str], logs: Sequence[str]) -> tuple[str, ...]:
    """Name the products that a file of the artifact computes in float though the scheme makes them integer."""
    names = _weights(model)
    stored = [compiler_log.weights(log) for log in logs]
    return tuple(name for name in integer if any(found.get(names[name]) != {"INT8"} for found in stored))


class RockchipSession:
    """Run built models in a child process's simulator, each text in the smallest bucket that holds it.

    It is no `TimesItself`: a simulator's time is not the device's.
    """

    def __init__(self, child: Worker, built: Mapping[int, str]) -> None:
        """Take a child process that has built the models, and its name of the model for each bucket."""
        self._worker = child
        self._built = built
        self._buckets = sorted(built)

    def __call__(self, feeds: AnyFeeds) -> Embeddings:
        """Give the sentence embeddings, float32[batch, dim].

        Raises:
            ConfigError: there are no texts, or one is longer than the largest bucket.
        """
        return embed_by_bucket(feeds, self._buckets, self._run)

    def _run(self, bucket: int, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Embeddings:
        inputs = [pack(rows[:, None, :]) for rows in (input_ids, attention_mask)]
        reply = self._worker.call(do="run_many", model=self._built[bucket], inputs=inputs)
        vectors = unpack_reply(reply["output"])
        return vectors.reshape(len(vectors), -1)
