"""Write ONNX files as other people export them: torch's older exporter, ONNX Runtime's optimisers, half floats."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import onnx

NAMES = ("input_ids", "attention_mask", "token_type_ids")


def legacy(body: Path, out: Path, opset: int, attention: str = "eager") -> Path:
    """Export a model directory's encoder with torch's older exporter; biases and norms are drawn: all differ."""
    import torch
    from transformers import AutoModel

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.encoder = AutoModel.from_pretrained(body, attn_implementation=attention).eval()
            for parameter in self.encoder.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return self.encoder(**dict(zip(NAMES, tensors, strict=True))).last_hidden_state

    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 0, 0, 0]])
    axes = {name: {0: "batch_size", 1: "sequence_length"} for name in (*NAMES, "last_hidden_state")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            LastHiddenState(), (ids, (ids > 0).long(), torch.zeros_like(ids)), str(out), dynamo=False,
            opset_version=opset, input_names=list(NAMES), output_names=["last_hidden_state"], dynamic_axes=axes,
        )  # fmt: skip
    return out


def optimised(given: Path, out: Path) -> Path:
    """Let ONNX Runtime write its optimised graph."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(out), 4
    ort.InferenceSession(str(given), options, providers=["CPUExecutionProvider"])
    return out


def fused(given: Path, out: Path, half: bool) -> Path:
    """Let ONNX Runtime's transformer optimiser fuse attention and embeddings, and optionally write FP16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime.transformers import optimizer

        with contextlib.chdir(given.parent):  # it leaves check0_base_optimize.onnx and others where it stands
            model = optimizer.optimize_model(given.name, model_type="bert", num_heads=4, hidden_size=64)
        if half:
            model.convert_float_to_float16()
        model.save_model_to_file(str(out))
    return out


def operators(path: Path) -> set[str]:
    """Give the operators of a file, those of other domains with it."""
    graph = onnx.load(path, load_external_data=False).graph
    return {f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.node}
