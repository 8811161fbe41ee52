"""Load one model in this process, time its runs, and read its peak memory: the child of `edgeq.bundle.benchmark`."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeq.errors import ConfigError, EdgeqError
from edgeq.records import Record

if TYPE_CHECKING:
    from edgeq.data.batches import AnyFeeds
    from edgeq.data.sessions import Embeddings, Session


class Job(Record):
    """Hold the model, threads and shape of one measurement."""

    model: str  # a bundle, or a float ONNX file
    threads: int
    batch: int
    sequence: int
    vocabulary: int
    pixels: tuple[int, int] | None = None  # height and width of images, which have no tokens
    num_runs: int
    warmup_runs: int


class Sample(Record):
    """Hold the wall time of each run, and the peak resident memory of the child process."""

    latencies_ms: tuple[float, ...]
    peak_memory_bytes: int


def _session(job: Job) -> Session:
    """Load a bundle's artifact, or a float model."""
    path = Path(job.model)
    if path.is_file():
        return _float_session(job)
    from edgeq.backends.registry import find
    from edgeq.bundle.manifest import load_manifest

    manifest = load_manifest(path)
    backend = find(manifest.artifact.backend, job.model)
    return backend.load(manifest.artifact, path, manifest.target, threads=job.threads)


def _float_session(job: Job) -> Session:
    """Load a float model with ONNX Runtime's default options."""
    import onnxruntime as ort

    from edgeq.graph.read import read_onnx

    read_onnx(Path(job.model))
    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    session = ort.InferenceSession(job.model, options, providers=["CPUExecutionProvider"])
    inputs = [port.name for port in session.get_inputs()]
    outputs = [port.name for port in session.get_outputs()]
    if "sentence_embedding" not in outputs:
        raise ConfigError(
            f"{job.model}: outputs are {', '.join(outputs)}; sentence_embedding is needed. "
            "Give --against the float model that edgeq exported."
        )

    def embed(feeds: AnyFeeds) -> Embeddings:
        embeddings: Embeddings = session.run(["sentence_embedding"], feeds.named(inputs))[0]
        return embeddings

    return embed


def _feeds(job: Job) -> AnyFeeds:
    """Make a batch of random tokens, or of random pixels."""
    from edgeq.data.batches import PixelFeeds
    from edgeq.data.tokens import Feeds

    rng = np.random.default_rng(0)
    if job.pixels is not None:
        return PixelFeeds(rng.standard_normal((job.batch, 3, *job.pixels), np.float32))
    ids = rng.integers(0, job.vocabulary, (job.batch, job.sequence), np.int64)
    return Feeds(input_ids=ids, attention_mask=np.ones_like(ids))


def _run(job: Job) -> Sample:
    """Load the model, run it `warmup_runs` times, and time the runs after these."""
    from edgeq.backends.contract import TimesItself

    feeds = _feeds(job)
    session = _session(job)
    if isinstance(session, TimesItself):
        latencies_ms = tuple(session.milliseconds(feeds, job.num_runs, job.warmup_runs))
        return Sample(latencies_ms=latencies_ms, peak_memory_bytes=session.peak_memory_bytes())
    for _ in range(job.warmup_runs):
        session(feeds)
    latencies: list[float] = []
    for _ in range(job.num_runs):
        begin = time.perf_counter_ns()
        session(feeds)
        latencies.append((time.perf_counter_ns() - begin) / 1e6)
    return Sample(latencies_ms=tuple(latencies), peak_memory_bytes=peak_memory_bytes())


def peak_memory_bytes() -> int:
    """Read this process's peak resident memory (VmHWM).

    `getrusage` does not serve: its maximum survives exec, so a child would report its parent's peak.

    Source: Linux, Documentation/filesystems/proc.rst, table 1-2, VmHWM.

    Raises:
        EdgeqError: the kernel does not list it.
    """
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.is_file() else None
    if found is None:
        raise EdgeqError("/proc/self/status: no VmHWM, which peak memory is read from. Run `edgeq bench` on Linux.")
    return int(found[1]) * 1024


def _main() -> int:
    """Run the job in argv[1], as JSON, and write the sample to stdout as JSON."""
    try:
        sample = _run(Job.model_validate_json(sys.argv[1]))
    except EdgeqError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(sample.model_dump_json() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
