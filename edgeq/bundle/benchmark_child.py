"""Load one model in this process, time its runs when asked, and read its peak memory.

The child of `edgeq.bundle.turns`. It stays, and answers `edgeq.system.worker.Worker`. An error of edgeq's is a reply
like any other, so that it keeps its kind: {"failed": message, "exit_code": its own}.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeq.errors import ConfigError, EdgeqError, LoweringFailed
from edgeq.records import Record
from edgeq.system.child_server import Actions, Announce, serve_standard_streams

if TYPE_CHECKING:
    from edgeq.data.batches import AnyFeeds
    from edgeq.data.sessions import Embeddings, Session

_Action = Callable[..., dict[str, Any]]


class Job(Record):
    """Hold the model, threads and shape that a child is made for."""

    model: str  # a bundle, or a float ONNX file
    threads: int
    batch: int
    sequence: int
    vocabulary: int
    pixels: tuple[int, int] | None = None  # height and width of images, which have no tokens


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
        shape = (job.batch, 3, *job.pixels)
        pixels = rng.integers(0, 256, shape).astype(np.uint8)
        return PixelFeeds(rng.standard_normal(shape, np.float32), pixels)
    ids = rng.integers(0, job.vocabulary, (job.batch, job.sequence), np.int64)
    return Feeds(input_ids=ids, attention_mask=np.ones_like(ids))


def milliseconds(session: Session, feeds: AnyFeeds, runs: int, untimed: int) -> list[float]:
    """Give the wall time of each of `runs` runs in a row, after `untimed` others; a session that times itself does."""
    from edgeq.backends.contract import TimesItself

    if isinstance(session, TimesItself):
        return session.milliseconds(feeds, runs, untimed)
    for _ in range(untimed):
        session(feeds)
    found = []
    for _ in range(runs):
        begin = time.perf_counter_ns()
        session(feeds)
        found.append((time.perf_counter_ns() - begin) / 1e6)
    return found


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


class _Child:
    """Hold the loaded model between requests."""

    def __init__(self, announce: Announce) -> None:
        self._announce = announce
        self._loaded: tuple[Session, AnyFeeds] | None = None

    def load(self, job: str) -> dict[str, Any]:
        """Load the model of a job, given as JSON."""
        made = Job.model_validate_json(job)
        self._announce(f"loading {made.model}")
        self._loaded = _session(made), _feeds(made)
        return {}

    def turn(self, runs: int, untimed: int) -> dict[str, Any]:
        """Time runs in a row."""
        self._announce("running")
        return {"milliseconds": milliseconds(*self._model(), runs, untimed)}

    def memory(self) -> dict[str, Any]:
        """Read the peak resident memory of the process that holds the model."""
        from edgeq.backends.contract import TimesItself

        session, _ = self._model()
        found = session.peak_memory_bytes() if isinstance(session, TimesItself) else peak_memory_bytes()
        return {"peak_memory_bytes": found}

    def _model(self) -> tuple[Session, AnyFeeds]:
        if self._loaded is None:
            raise EdgeqError("the child process has no model; a load is needed first. Report this as a defect.")
        return self._loaded


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether a runtime could not get memory; ONNX Runtime and OpenVINO say so in words of their own."""
    return isinstance(error, MemoryError) or re.search("bad_alloc|allocate memory", str(error)) is not None


def _told(action: _Action) -> _Action:
    """Turn an error of edgeq's, and memory that runs out, into a reply with its exit code."""

    @functools.wraps(action)
    def answer(**request: Any) -> dict[str, Any]:
        try:
            return action(**request)
        except EdgeqError as error:
            return {"failed": str(error), "exit_code": error.exit_code}
        except Exception as error:  # foreign code: a runtime may raise anything
            if not _is_out_of_memory(error):
                raise
            needed = "Give smaller batches or fewer tokens, or measure fewer models at once."
            return {"failed": f"memory ran out ({error}). {needed}", "exit_code": LoweringFailed.exit_code}

    return answer


def _actions(announce: Announce) -> Actions:
    child = _Child(announce)
    return {"load": _told(child.load), "turn": _told(child.turn), "memory": _told(child.memory)}


if __name__ == "__main__":
    serve_standard_streams(_actions)
    sys.exit(0)
