"""Run FP32 models in ONNX Runtime: the reference that every artifact is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from edgeq.data.batches import AnyFeeds
from edgeq.errors import ConfigError
from edgeq.graph import external_data
from edgeq.system.files import work_dir

FloatArray = NDArray[np.float32]

RUNTIME_ERRORS = (
    ort_errors.InvalidProtobuf,
    ort_errors.InvalidGraph,
    ort_errors.InvalidArgument,
    ort_errors.NoSuchFile,
    ort_errors.Fail,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


class FloatSession:
    """Keep an FP32 model loaded; call it with feeds to get float32[batch, dim]."""

    def __init__(self, model: str | bytes, threads: int = 0, optimize: bool = True, is_large: bool = False) -> None:
        """Load a model.

        Args:
            model: a path, or a serialised model under 2 GB; its external data is named relative to the root folder.
            threads: intra-op threads; 0 leaves it to ONNX Runtime.
            optimize: False keeps every named tensor observable and the arithmetic as written.
            is_large: leave the weights in their file. ONNX Runtime would pack a copy of each for speed.

        Raises:
            ConfigError: ONNX Runtime cannot load the model.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Memory patterns and the arena trade memory for speed on repeated shapes; lengths vary here. The arena doubles
        # what it holds with every request that does not fit: past 5 GB for texts of 4,096 tokens that take 2.5 without.
        options.enable_mem_pattern = False
        options.enable_cpu_mem_arena = False
        # As written: ONNX Runtime's own order leaves what observes a tensor to the end, and keeps them all till then.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        # numpy works between the runs; threads that spin while they wait would take the cores from it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if is_large:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if isinstance(model, bytes):
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", Path("/").anchor)
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except RUNTIME_ERRORS as error:
            name = model if isinstance(model, str) else "the model in memory"
            raise ConfigError(f"{name}: ONNX Runtime cannot load it as an ONNX model: {error}") from error
        self.inputs = [item.name for item in self._session.get_inputs()]
        self.names = [item.name for item in self._session.get_outputs()]

    @classmethod
    def of(cls, model: onnx.ModelProto | Path, threads: int = 0, optimize: bool = True) -> FloatSession:
        """Load a model from a file or from memory.

        From memory it goes through a file, too: a session that was given bytes keeps them as long as it lives.
        """
        if isinstance(model, Path):
            return cls(str(model), threads, optimize, external_data.has_data(model))
        if any(map(external_data.is_external, model.graph.initializer)):
            return cls(external_data.from_root(model), threads, optimize, external_data.is_large(model))
        with work_dir() as folder:
            path = folder / "model.onnx"
            path.write_bytes(model.SerializeToString())
            return cls(str(path), threads, optimize)

    def run(self, names: Sequence[str] | None, feeds: AnyFeeds) -> list[FloatArray]:
        """Run the model and give the named outputs, or all, in order."""
        outputs: list[FloatArray] = self._session.run(names, feeds.named(self.inputs))
        return outputs

    def outputs(self, feeds: AnyFeeds) -> dict[str, FloatArray]:
        """Run the model and give every output by name."""
        return dict(zip(self.names, self.run(None, feeds), strict=True))

    def __call__(self, feeds: AnyFeeds) -> FloatArray:
        """Give the sentence embeddings, float32[batch, dim]."""
        return self.run(["sentence_embedding"], feeds)[0]
