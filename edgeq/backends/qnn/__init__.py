"""Lower a QDQ model to HTP context binaries, one per bucket, and run them in QAIRT's emulator in a child process."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.backends.contract import Plan, Rejection, Rule, has_buckets, reads_tokens, rejected, takes_kinds
from edgeq.data.batches import AnyFeeds
from edgeq.data.sessions import Embeddings, embed_by_bucket
from edgeq.data.tokens import bucket_lengths
from edgeq.errors import BundleCorrupt, LoweringFailed, ToolMissing
from edgeq.records import Artifact, Placement, QdqModel, Target
from edgeq.system.child_server import pack
from edgeq.system.files import file_ref, replacing_dir
from edgeq.system.untrusted import require_confined
from edgeq.system.worker import Worker, unpack_reply

FOLDER = "qnn"

# The SoCs whose number and HTP version are known. Source: pytorch/executorch, backends/qualcomm/serialization,
# qc_schema.py (QcomChipset); 60, Snapdragon X Elite: microsoft/Olive, the option `soc` of its QNN context binary pass;
# 30: what QAIRT 2.51 writes for v68 without a number.
_HTP_OF_SOC = {30: 68, 43: 73, 57: 75, 60: 73, 69: 79, 87: 81}

_SETTINGS = {"soc_model", "htp_arch", "vtcm_mb", "optimization_mode", "io"}
_LOWEST_GLIBC = (2, 35)  # Source: onnxruntime-qnn 2.7.0, the wheel's tag manylinux_2_35_x86_64
_RUN_LIMIT_S = 3600.0  # the emulator takes seconds for a text


is_for_htp = takes_kinds(
    ("htp",), "The scheme must be one for HTP: unsigned integers in every tensor, nothing float.", "has another form"
)


def has_known_settings(model: QdqModel, target: Target) -> str | None:
    """[runtime] holds soc_model, htp_arch, vtcm_mb, optimization_mode (1 to 3) and io ("float" or "quantized")."""
    unknown = set(target.runtime) ^ _SETTINGS
    if unknown:
        return f"missing or unknown: {', '.join(sorted(unknown))}"
    if target.runtime["io"] not in ("float", "quantized"):
        return f'io is "{target.runtime["io"]}"'
    if target.runtime["optimization_mode"] not in (1, 2, 3):
        return f"optimization_mode is {target.runtime['optimization_mode']}"
    return None


def names_one_soc(model: QdqModel, target: Target) -> str | None:
    """soc_model must be a known SoC and htp_arch its own: the compiler lets soc_model win without a word."""
    soc, arch = (target.runtime.get(key) for key in ("soc_model", "htp_arch"))
    if soc not in _HTP_OF_SOC:
        return f"soc_model is {soc}; known are {', '.join(map(str, _HTP_OF_SOC))}"
    known = _HTP_OF_SOC[int(soc)]
    return None if arch == known else f"soc_model {soc} has HTP v{known}, htp_arch is {arch}"


RULES: tuple[Rule, ...] = (reads_tokens, is_for_htp, has_buckets, has_known_settings, names_one_soc)


def tools() -> Mapping[str, str]:
    """Give the versions of ONNX Runtime and its QNN plugin, which compile and run context binaries.

    Raises:
        ToolMissing: onnxruntime-qnn is not installed, or needs a newer glibc.
    """
    try:
        found = {name: version(name) for name in ("onnxruntime", "onnxruntime-qnn")}
    except PackageNotFoundError as error:
        raise ToolMissing(f'{error.name} is not installed; pip install "edgeq[qnn]"') from error
    library, release = platform.libc_ver()
    numbers = tuple(int(part) for part in release.split(".")[:2]) if library == "glibc" else (0, 0)
    if numbers < _LOWEST_GLIBC:
        raise ToolMissing(
            f"onnxruntime-qnn {found['onnxruntime-qnn']} needs glibc {'.'.join(map(str, _LOWEST_GLIBC))} or newer; "
            f"this machine has {library or 'another C library'} {release}. Use a newer system (Debian 12, "
            'Ubuntu 22.04) or a container of one, and there pip install "edgeq[qnn]"'
        )
    return found


def rejections(model: QdqModel, target: Target) -> tuple[Rejection, ...]:
    """List every rule that the model or the target does not meet."""
    return rejected(RULES, model, target)


def planned(model: ir.Model, bucket: int, target: Target) -> Plan:
    """Hold a QDQ model for one sequence length against its table of positions."""
    from edgeq.backends.qnn.static import too_few_positions

    short = too_few_positions(model.graph, bucket)
    return Plan(problems=(short,) if short else ())


def lower(model: QdqModel, target: Target, out_dir: Path) -> Artifact:
    """Write `qnn/model_seq_N_ctx.onnx` with its binary below `out_dir`, for each bucket.

    Args:
        model: the QDQ model.
        target: whose SoC, buckets and settings are used.
        out_dir: an existing folder.

    Returns:
        The artifact; its placement counts operators of the largest bucket, as the compiler took them.

    Raises:
        ToolMissing: onnxruntime-qnn cannot be used here.
        ConfigError: a bucket is longer than the model's table of positions.
        LoweringFailed: the compiler refuses or dies, leaves a node on the CPU, or wrote a binary for another SoC.
        StorageFailed: the files cannot be written.
    """
    from edgeq.backends.qnn.compiling import BINARY, CONTEXT, compile_bucket
    from edgeq.backends.qnn.static import static

    versions = dict(tools())
    buckets = sorted(bucket_lengths(target.buckets_tokens, model.max_sequence), reverse=True)
    names = [pattern.format(length) for length in buckets for pattern in (CONTEXT, BINARY)]
    with replacing_dir(out_dir / FOLDER) as folder:
        compiled = [
            compile_bucket(static(ir.load(model.file.path), length, target), length, target, folder)
            for length in buckets
        ]
        missing = {name for part in compiled for name in model.integer_matmuls if name not in part.products}
        if missing:
            raise LoweringFailed(
                f"{target.name}: {', '.join(sorted(missing))} are weight products of the scheme, but the compiler took "
                "none of that name; please report the model"
            )
        extra = {path.name for path in folder.iterdir()} ^ set(names)
        if extra:
            raise LoweringFailed(f"{target.name}: the compiler wrote other files: {', '.join(sorted(extra))}")
    return Artifact(
        backend=target.backend,
        target=target.name,
        files=tuple(file_ref(out_dir / FOLDER / name, relative_to=out_dir) for name in names),
        qdq_sha256=model.file.sha256,
        placement=Placement(
            integer_matmuls=len(model.integer_matmuls),
            float_by_scheme=(),
            float_fallbacks=(),
            operators=compiled[0].operators,
        ),
        tools={**versions, "QAIRT": compiled[0].info["build"]},
    )


def load(artifact: Artifact, bundle: Path, target: Target, threads: int = 0) -> QnnSession:
    """Load the context binaries in QAIRT's emulator, in a child process.

    Args:
        artifact: the result of `lower`.
        bundle: the folder that its paths are relative to.
        target: SoC, buckets and settings.
        threads: ignored; the emulator chooses.

    Raises:
        ToolMissing: onnxruntime-qnn cannot be used here.
        BundleCorrupt: a binary is for another SoC, or has other inputs and outputs than its target asks for.
        ConfigError: a context names a file outside its folder.
        LoweringFailed: the emulator refuses a binary, or dies of it.
    """
    tools()
    from edgeq.backends.qnn.compiling import described, mismatches, worker

    binaries = {_length(ref.path): bundle / ref.path for ref in artifact.files if ref.path.endswith(".bin")}
    contexts = {_length(ref.path): bundle / ref.path for ref in artifact.files if ref.path.endswith(".onnx")}
    for path in contexts.values():
        require_confined(path)
    infos = dict(zip(binaries, described(list(binaries.values())), strict=True))
    for length, path in binaries.items():
        problems = mismatches(infos[length], target, length)
        if problems:
            raise BundleCorrupt(f"{path}: {'; '.join(problems)}. Fetch or export the bundle again.")
    child = worker(_RUN_LIMIT_S)
    child.call(do="load", contexts={length: str(path.resolve()) for length, path in contexts.items()})
    return QnnSession(child, {length: info["outputs"][0] for length, info in infos.items()})


def _length(path: str) -> int:
    """Read the bucket from a file's name, e.g. 128 from qnn/model_seq_128_ctx.onnx."""
    found = re.fullmatch(r"[^_]+_seq_(\d{1,6})_.*", Path(path).name)
    if found is None:
        raise BundleCorrupt(f"{path}: no length is in this name, as in model_seq_128_ctx.onnx. Export it again.")
    return int(found[1])


class QnnSession:
    """Run context binaries in a child process, each text in the smallest bucket that holds it.

    It is no `TimesItself`: an emulator's time is not the device's.
    """

    def __init__(self, child: Worker, outputs: Mapping[int, Mapping[str, Any]]) -> None:
        """Take a child process that has loaded the binaries, and each binary's description of its output."""
        self._worker = child
        self._outputs = outputs
        self._buckets = sorted(outputs)

    def __call__(self, feeds: AnyFeeds) -> Embeddings:
        """Give the sentence embeddings, float32[batch, dim]; quantised outputs are dequantised with the binary's scale.

        Raises:
            ConfigError: there are no texts, or one is longer than the largest bucket.
        """
        return embed_by_bucket(feeds, self._buckets, self._run)

    def _run(self, bucket: int, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Embeddings:
        output = self._outputs[bucket]
        dtype = np.int64 if output["scale"] is None else np.int32
        inputs = {
            name: pack(rows.astype(dtype)[:, None, :])
            for name, rows in (("input_ids", input_ids), ("attention_mask", attention_mask))
        }
        vectors = unpack_reply(self._worker.call(do="run_many", length=bucket, inputs=inputs)["output"])[:, 0]
        if output["scale"] is None:
            return vectors.astype(np.float32)
        embeddings: Embeddings = (vectors.astype(np.float32) - output["zero_point"]) * np.float32(output["scale"])
        return embeddings
