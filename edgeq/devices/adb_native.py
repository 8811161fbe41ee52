"""Run golden texts on a phone without Python through LiteRT's `benchmark_model`, and measure parity on this machine.

The user provides the binary. Each run reads one text and writes the quantised vector to a file. Its limits: .tflite
files only, texts only, and no times, because the binary prints averages where a report needs percentiles. ONNX
Runtime's `onnxruntime_perf_test` writes no outputs, so bundles for it are refused.
Source: tensorflow 2.16, lite/tools/benchmark: README.md (inputs) and benchmark_tflite_model.cc (signature_to_run_for,
output_filepath).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.bundle.golden import read_golden
from edgeq.bundle.manifest import MANIFEST, load_manifest
from edgeq.data.batches import AnyFeeds
from edgeq.data.sessions import Embeddings, embed_batches, embed_by_bucket
from edgeq.data.tokens import Tokens, batches, bucket_lengths, token_limit
from edgeq.devices.blobs import Blobs
from edgeq.devices.contract import Job, Phone
from edgeq.devices.report import Conditions, DeviceMachine, DeviceReport, judged
from edgeq.errors import BundleCorrupt, ParityFailed, Unsupported
from edgeq.evaluation import parity, vector_measures
from edgeq.records import Exactness, Manifest, Measures, RunsOn
from edgeq.system.files import sha256_file, work_dir

_INPUTS = ("input_ids", "attention_mask")
_MACHINES = {"arm64": "aarch64", "armv8l": "aarch64"}


def validate_natively(phone: Phone, binary: Path, blobs: Blobs, folder: str, job: Job) -> DeviceReport:
    """Run the golden texts through the binary on the phone, one per run, and report parity.

    Args:
        phone: with the bundle's files in its store.
        binary: LiteRT's benchmark_model for the phone.
        blobs: the files in the store.
        folder: an empty folder on the phone.
        job: the bundle, and how to run it.

    Raises:
        Unsupported: the artifact is no .tflite file of texts.
        EdgeqError: the errors of `Transport.validate`.
    """
    manifest = load_manifest(job.bundle)
    artifact = manifest.artifact.files[0]
    if manifest.target.backend != "tflite":
        raise Unsupported(
            f"{job.bundle}: --native runs .tflite files; this is a bundle of {manifest.target.backend}, whose native "
            "tools write no vectors. Give --device-python a Python on the phone."
        )
    phone.push(binary, f"{folder}/native")
    phone.shell(["chmod", "755", f"{folder}/native"], "making the binary executable")
    session = _Native(phone, folder, dict((name, sha) for name, sha in blobs.files)[artifact.path], manifest, job)
    golden = read_golden(job.bundle)
    tokens = Tokens(tuple(tuple(row) for row in golden.token_ids()), 0, golden.pad_id)
    vectors = embed_batches(session, batches(tokens), len(tokens))
    limit = token_limit(manifest.target.buckets_tokens, manifest.source.max_sequence)
    job.progress("invariance", 0, 1)
    few = manifest.target.gate.parity_texts
    invariance = parity.invariance(session, tokens, limit, manifest.target.buckets_tokens, few)
    measures, failures = None, ("the vectors cannot be compared.",)
    try:
        measures = parity.measure(golden.reference, vectors, golden.texts, invariance)
    except ParityFailed as error:
        failures = (str(error),)
    host = None
    if golden.embeddings is not None and measures is not None:
        host = Exactness.model_validate(vector_measures.exactness(golden.embeddings, vectors))
    return _report(phone, manifest, sha256_file(job.bundle / MANIFEST), measures, host, failures)


class _Native:
    """Run each text through the binary: a session for `edgeq.evaluation.parity`."""

    def __init__(self, phone: Phone, folder: str, sha256: str, manifest: Manifest, job: Job) -> None:
        """Read the vectors' scale and zero point from the .tflite file."""
        from edgeq.backends.tflite import output_params
        from edgeq.backends.tflite.sessions import SIGNATURE

        self._phone, self._folder, self._job, self._signature = phone, folder, job, SIGNATURE
        self._graph = f"{phone.root}/store/{sha256}"
        self._threads = job.threads or int(manifest.target.runtime["threads"])
        self._buckets = bucket_lengths(manifest.target.buckets_tokens, manifest.source.max_sequence)
        self._scale, self._zero_point = output_params(job.bundle / manifest.artifact.files[0].path)
        self._dim, self._runs, self._count = manifest.source.dim, 0, manifest.golden.count

    def __call__(self, feeds: AnyFeeds) -> Embeddings:
        """Give float32[batch, dim]."""
        return embed_by_bucket(feeds, self._buckets, self._run)

    def _run(self, bucket: int, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> Embeddings:
        rows = [
            self._one(bucket, dict(zip(_INPUTS, pair, strict=True)))
            for pair in zip(input_ids, attention_mask, strict=True)
        ]
        values = np.stack(rows).astype(np.float32)
        embeddings: Embeddings = (values - self._zero_point) * np.float32(self._scale)
        return embeddings

    def _one(self, bucket: int, arrays: Mapping[str, NDArray[np.int64]]) -> NDArray[np.int8]:
        """Run one text; give its quantised vector, int8[dim].

        Raises:
            BundleCorrupt: the binary wrote another number of bytes.
        """
        with work_dir() as here:
            for name, array in arrays.items():
                (here / name).write_bytes(array.astype("<i4").tobytes())
                self._phone.push(here / name, f"{self._folder}/{name}")
            out = f"{self._folder}/vector"
            self._phone.script(f"rm -f {shlex.quote(out)} && {shlex.join(self._words(bucket, out))}", "benchmark_model")
            self._phone.pull(out, here / "vector")
            found = np.frombuffer((here / "vector").read_bytes()[: self._dim + 1], np.int8)
        if len(found) != self._dim:
            raise BundleCorrupt(
                f"{self._phone.name}: benchmark_model wrote {len(found)} bytes for a vector of {self._dim} codes. Give "
                "--native a benchmark_model of TensorFlow 2.16 or newer."
            )
        self._runs += 1
        if self._runs <= self._count:
            self._job.progress("run", self._runs, self._count)
        return found

    def _words(self, bucket: int, out: str) -> list[str]:
        """Give the binary's command line."""
        files = ",".join(f"{name}:{self._folder}/{name}" for name in _INPUTS)
        return [
            f"{self._folder}/native", f"--graph={self._graph}", f"--num_threads={self._threads or -1}", "--num_runs=1",
            "--warmup_runs=0", "--max_secs=0", f"--signature_to_run_for={self._signature.format(bucket)}",
            f"--input_layer={','.join(_INPUTS)}", f"--input_layer_shape=1,{bucket}:1,{bucket}",
            f"--input_layer_value_files={files}", f"--output_filepath={out}",
        ]  # fmt: skip


def _report(
    phone: Phone, manifest: Manifest, sha256: str, measures: Measures | None, host: Exactness | None,
    failures: tuple[str, ...],
) -> DeviceReport:  # fmt: skip
    """Judge the measures, and make the report with a description of the phone."""
    machine = _machine(phone, manifest.target.runs_on)
    nothing = Conditions(temperatures_c={}, frequencies_mhz={})
    report = DeviceReport(
        format=1, target=manifest.target.name, manifest_sha256=sha256, transport="adb-native",
        ran_on=manifest.target.runs_on.elsewhere if machine.lacks else "device", status="failed", failures=failures,
        measures=measures, host=host, machine=machine, tools={"benchmark_model": "given by its path"},
        threads=int(manifest.target.runtime["threads"]), load_ms=None, peak_memory_bytes=None, cells=(), before=nothing,
        after=nothing,
    )  # fmt: skip
    found = judged(report, manifest)
    return report.model_copy(update={"failures": found, "status": "failed" if found else "passed"})


def _machine(phone: Phone, runs_on: RunsOn) -> DeviceMachine:
    """Read the phone's processor and model."""
    name = phone.shell(["uname", "-m"], "asking for the processor").strip()[:40]
    cpuinfo = phone.shell(["cat", "/proc/cpuinfo"], "asking for the processor")
    told: dict[str, Any] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), value.strip())
    flags = tuple(sorted(set(str(told.get("Features", "")).split())))
    model = phone.script("getprop ro.product.model 2>/dev/null || true", "asking for the model").strip()
    spelled = _MACHINES.get(name, name)
    lacks = [f"the CPU lacks {flag}" for flag in runs_on.cpu_flags_all if flag not in flags]
    if spelled != runs_on.machine:
        lacks = [f"the machine is {spelled}, {runs_on.machine} is needed"]
    return DeviceMachine(
        machine=spelled, accelerator=None, cpu=(model or str(told.get("Hardware", spelled)))[:200],
        cores=max(1, cpuinfo.count("processor")), cpu_flags=flags, system="Android", memory_bytes=None,
        lacks=tuple(lacks),
    )  # fmt: skip
