"""Run one model in its runtime, in a process of its own: `python runner.py`, spoken to by `edgeq.system.worker`.

A script, not a module: it runs in environments where edgeq is not installed, and imports the standard library, numpy
and the one runtime it is asked for. Requests, one JSON object per line:

    {"do": "load", "runtime", "path", "threads"}        -> {"buckets": [lengths, or none where shapes are dynamic]}
    {"do": "embed", "feeds", "out"}                     -> {"texts"}; feeds: .npz of ids_0, mask_0, ids_1, ...;
                                                           out: .npy, float32[texts, dim], batch after batch
    {"do": "time", "batch", "sequence", "runs", "warmup"} -> {"milliseconds": [one per run]}

Every runtime gets the same token ids and gives unit vectors; where pooling lies outside the graph, it is timed too.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

VOCABULARY = 30000

Array = Any  # a numpy array


class Loaded(Protocol):
    """Hold a model: called with int64[batch, sequence] twice, it gives float32[batch, dim]."""

    buckets: list[int]

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Embed one batch."""
        ...


class OnnxRuntime:
    """An ONNX file with pooling inside, with ONNX Runtime's defaults but for the threads."""

    buckets: list[int] = []

    def __init__(self, path: str, threads: int, level: str = "ORT_ENABLE_ALL") -> None:
        """Load the file."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Embed one batch."""
        return self._session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})[0]


class MirrorInOnnxRuntime(OnnxRuntime):
    """An integer-only QDQ file: ONNX Runtime's optimiser fails on one beyond its basic level."""

    def __init__(self, path: str, threads: int) -> None:
        """Load the file."""
        super().__init__(path, threads, "ORT_ENABLE_BASIC")


class OpenVino:
    """An IR with pooling inside, with OpenVINO's defaults for latency but for the threads."""

    buckets: list[int] = []

    def __init__(self, path: str, threads: int) -> None:
        """Load the file."""
        import openvino

        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self._request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Embed one batch."""
        return self._request.infer({"input_ids": ids, "attention_mask": mask})[0]


class InBuckets(ABC):
    """A model of some lengths, batch 1: each text runs in the smallest that it fits; alone, at the length it has."""

    buckets: list[int]

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Embed one batch, one text after the other."""
        sizes = [ids.shape[1]] if len(ids) == 1 else mask.sum(axis=1).tolist()
        return np.concatenate([self._one(i, m, size) for i, m, size in zip(ids, mask, sizes, strict=True)])

    def _one(self, ids: Array, mask: Array, size: int) -> Array:
        bucket = next(bucket for bucket in self.buckets if bucket >= size)
        rows = (np.pad(row[:bucket], (0, max(0, bucket - len(row))))[None] for row in (ids, mask))
        return self.run(bucket, *rows)

    @abstractmethod
    def run(self, bucket: int, ids: Array, mask: Array) -> Array:
        """Give float32[1, dim] of int64[1, bucket] twice."""


class LiteRt(InBuckets):
    """A .tflite file with a signature for each length."""

    def __init__(self, path: str, threads: int) -> None:
        """Load the file."""
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_path=path, num_threads=threads)
        lengths = {int(name.partition("_")[2]): name for name in self._interpreter.get_signature_list()}
        self._runners = {length: self._interpreter.get_signature_runner(lengths[length]) for length in sorted(lengths)}
        self.buckets = list(self._runners)

    def run(self, bucket: int, ids: Array, mask: Array) -> Array:
        """Run a signature."""
        runner = self._runners[bucket]
        (found,) = runner(input_ids=ids.astype(np.int32), attention_mask=mask.astype(np.int32)).values()
        (detail,) = runner.get_output_details().values()
        scale, zero_point = detail["quantization"]
        return found if scale == 0 else (found.astype(np.float32) - zero_point) * np.float32(scale)


class Rockchip(InBuckets):
    """A folder of float ONNX files, one for each length, that rknn-toolkit2 quantises as it likes and simulates."""

    def __init__(self, path: str, threads: int) -> None:
        """Build: the simulator runs only what it has built in the same process."""
        folder = Path(path)
        asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
        self._built = {length: self._build(folder, length, asked) for length in sorted(asked["buckets"])}
        self.buckets = list(self._built)

    def _build(self, folder: Path, length: int, asked: dict[str, Any]) -> Any:
        from rknn.api import RKNN

        compiler, dataset = RKNN(verbose=False), str(folder / f"seq_{length}.txt")
        steps: list[Callable[[], int]] = [
            lambda: compiler.config(target_platform=asked["platform"]),  # its defaults: w8a8, minima and maxima
            lambda: compiler.load_onnx(model=str(folder / f"seq_{length}.onnx")),
            lambda: compiler.build(do_quantization=True, dataset=dataset, auto_hybrid=asked["auto_hybrid"]),
            lambda: compiler.export_rknn(str(folder / f"model_seq_{length}.rknn")),
            compiler.init_runtime,
        ]
        if any(step() for step in steps):  # stops at the first that fails
            raise ValueError(f"rknn-toolkit2 does not build {length} tokens")
        return compiler

    def run(self, bucket: int, ids: Array, mask: Array) -> Array:
        """Run the simulator."""
        return self._built[bucket].inference(inputs=[ids, mask])[0].reshape(1, -1)


class SentenceTransformers(ABC):
    """A folder of sentence-transformers, opened and pooled as its users do: the artifact ends before the pooling."""

    buckets: list[int] = []
    backend, file_name = "", ""

    def __init__(self, path: str, threads: int) -> None:
        """Load the folder."""
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        self._torch = torch
        settings = {"file_name": self.file_name, **self.settings(threads)}
        self._model = SentenceTransformer(path, backend=self.backend, device="cpu", model_kwargs=settings).eval()

    @abstractmethod
    def settings(self, threads: int) -> dict[str, Any]:
        """Give what limits the threads of the backend."""

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Embed one batch."""
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        with self._torch.inference_mode():
            found = self._model({name: self._torch.from_numpy(array) for name, array in given.items()})
        return found["sentence_embedding"].numpy()


class SentenceTransformersOnnx(SentenceTransformers):
    """What `export_dynamic_quantized_onnx_model` wrote."""

    backend, file_name = "onnx", "onnx/model_qint8_avx512_vnni.onnx"

    def settings(self, threads: int) -> dict[str, Any]:
        """Give session options."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        return {"session_options": options, "provider": "CPUExecutionProvider"}


class SentenceTransformersOpenVino(SentenceTransformers):
    """What `export_static_quantized_openvino_model` wrote."""

    backend, file_name = "openvino", "openvino/openvino_model_qint8_quantized.xml"

    def settings(self, threads: int) -> dict[str, Any]:
        """Give OpenVINO's settings."""
        return {"ov_config": {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(threads)}}


class Edgeq:
    """A bundle, in the backend it was made for."""

    def __init__(self, path: str, threads: int) -> None:
        """Load the bundle."""
        from edgeq.backends.registry import find
        from edgeq.bundle.manifest import load_manifest
        from edgeq.data.tokens import Feeds

        manifest = load_manifest(Path(path))
        backend = find(manifest.artifact.backend, path)
        self.session = backend.load(manifest.artifact, Path(path), manifest.target, threads)
        self.feeds = Feeds
        self.buckets = list(manifest.target.buckets_tokens)

    def __call__(self, ids: Array, mask: Array) -> Array:
        """Embed one batch."""
        return self.session(self.feeds(input_ids=ids, attention_mask=mask))


RUNTIMES: dict[str, Callable[[str, int], Loaded]] = {
    "edgeq": Edgeq,
    "onnxruntime": OnnxRuntime,
    "onnxruntime-mirror": MirrorInOnnxRuntime,
    "openvino": OpenVino,
    "litert": LiteRt,
    "rockchip": Rockchip,
    "sentence-transformers-onnx": SentenceTransformersOnnx,
    "sentence-transformers-openvino": SentenceTransformersOpenVino,
}


def embed(model: Loaded, feeds: str, out: str) -> dict[str, Any]:
    """Embed every batch of a file into another."""
    with np.load(feeds) as file:
        found = [model(file[f"ids_{i}"], file[f"mask_{i}"]) for i in range(len(file.files) // 2)]
    vectors = np.concatenate(found).astype(np.float32)
    np.save(out, vectors)
    return {"texts": len(vectors)}


def timed(model: Loaded, batch: int, sequence: int, runs: int, warmup: int) -> dict[str, Any]:
    """Time runs on random tokens without padding, the same for every model."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (batch, sequence), np.int64)
    mask = np.ones_like(ids)
    if isinstance(model, Edgeq) and hasattr(model.session, "milliseconds"):  # it times itself, in its own process
        return {"milliseconds": model.session.milliseconds(model.feeds(ids, mask), runs, warmup)}
    milliseconds = []
    for _ in range(warmup):
        model(ids, mask)
    for _ in range(runs):
        begin = time.perf_counter_ns()
        model(ids, mask)
        milliseconds.append((time.perf_counter_ns() - begin) / 1e6)
    return {"milliseconds": milliseconds}


def serve(replies: IO[str]) -> None:
    """Answer every request until there are no more."""
    model: Loaded | None = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        do = request.pop("do")
        try:
            if do == "load":
                model = RUNTIMES[request["runtime"]](request["path"], request["threads"])
                reply: dict[str, Any] = {"buckets": model.buckets}
            elif model is None:
                raise ValueError("nothing is loaded; a load is needed first")
            else:
                reply = {"embed": embed, "time": timed}[do](model, **request)
        except Exception as error:  # the one boundary: a runtime may raise anything
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Keep stdout for replies alone: what a runtime prints goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        serve(replies)


if __name__ == "__main__":
    main()
