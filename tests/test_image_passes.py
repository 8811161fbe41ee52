"""The rewrites of image models on the smallest graphs that have their patterns: structure, numbers, near misses."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from test_passes import graph, operators, rewritten, run

from edgeq.calibration.statistics import Statistics
from edgeq.graph.edit import checked
from edgeq.passes.drop_open_mask import drop_open_mask
from edgeq.passes.patch_product import patch_product
from edgeq.passes.pool_maps import pool_maps
from edgeq.quantization import affine, convolution
from edgeq.quantization.qdq import UnsignedQdqBuilder
from edgeq.quantization.schemes import SCHEMES

RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((2, 3, 8, 12)).astype(np.float32)
WEIGHT = RNG.standard_normal((5, 3, 4, 4)).astype(np.float32)
BIAS = RNG.standard_normal(5).astype(np.float32)


def patches(strides: list[int] = [4, 4], order: list[int] = [0, 2, 1], **more: object) -> onnx.ModelProto:  # noqa: B006
    rows, columns = (8 - 4) // strides[0] + 1, (12 - 4) // strides[1] + 1
    shape = np.array([0, 5, rows * columns], np.int64)
    nodes = [
        ("Conv", ["x", "w", "b"], "maps", {"strides": strides, **more}),
        ("Reshape", ["maps", "shape"], "flat", {}),
        ("Transpose", ["flat"], "y", {"perm": order}),
    ]
    return graph(nodes, {"w": WEIGHT, "b": BIAS, "shape": shape}, ["batch", 3, 8, 12])


def test_a_patch_embedding_becomes_a_product() -> None:
    model = patches()
    found, done = rewritten(model, patch_product)
    assert done.count == 1
    assert operators(found) == Counter(Reshape=2, Transpose=1, MatMul=1, Add=1)
    np.testing.assert_allclose(run(found, x=IMAGE), run(model, x=IMAGE), atol=1e-5)


@pytest.mark.parametrize("model", [patches([2, 2]), patches(order=[2, 0, 1]), patches([4, 2])])
def test_windows_that_overlap_or_maps_that_are_no_tokens_stay(model: onnx.ModelProto) -> None:
    found, done = rewritten(model, patch_product)
    assert done.count == 0
    assert operators(found)["Conv"] == 1
    assert operators(found)["MatMul"] == 0


def test_a_patch_embedding_that_makes_no_tokens_says_why() -> None:
    _, done = rewritten(patches(order=[2, 0, 1]), patch_product)
    assert "kernel and strides are equal" in done.near_misses[0]


def masked(hidden: bool) -> onnx.ModelProto:
    condition = np.ones((1, 1, 3, 3), bool)
    condition[0, 0, 0, 2] = not hidden
    nodes = [
        ("Where", ["condition", "zero", "fill"], "mask", {}),
        ("Add", ["x", "mask"], "scores", {}),
        ("Softmax", ["scores"], "y", {"axis": -1}),
    ]
    constants = {"condition": condition, "zero": np.float32(0.0), "fill": np.float32(-1e4)}
    return graph(nodes, {name: np.asarray(array) for name, array in constants.items()}, ["batch", 2, 3, 3])


def test_a_mask_that_masks_nothing_goes() -> None:
    scores = RNG.standard_normal((2, 2, 3, 3)).astype(np.float32)
    found, done = rewritten(masked(hidden=False), drop_open_mask)
    assert done.count == 1
    assert operators(found) == Counter(Softmax=1)
    np.testing.assert_array_equal(run(found, x=scores), run(masked(hidden=False), x=scores))


def test_a_mask_that_hides_something_stays_and_says_so() -> None:
    found, done = rewritten(masked(hidden=True), drop_open_mask)
    assert done.count == 0
    assert operators(found)["Add"] == 1
    assert "hides something" in done.near_misses[0]


def pooled(axis: int) -> onnx.ModelProto:
    nodes = [
        ("Reshape", ["x", "shape"], "flat", {}),
        ("Transpose", ["flat"], "tokens", {"perm": [0, 2, 1]}),
        ("ReduceMean", ["tokens", "axis"], "y", {"keepdims": 0}),
    ]
    constants = {"shape": np.array([0, 3, 96], np.int64), "axis": np.array([axis], np.int64)}
    return graph(nodes, constants, ["batch", 3, 8, 12])


def test_maps_are_averaged_as_they_are() -> None:
    found, done = rewritten(pooled(1), pool_maps)
    assert done.count == 1
    assert operators(found) == Counter(ReduceMean=1)
    np.testing.assert_allclose(run(found, x=IMAGE), run(pooled(1), x=IMAGE), atol=1e-6)


def test_a_mean_over_channels_stays_and_says_so() -> None:
    found, done = rewritten(pooled(2), pool_maps)
    assert done.count == 0
    assert operators(found)["Transpose"] == 1
    assert "not over their heights and widths" in done.near_misses[0]


def two_convolutions() -> onnx.ModelProto:
    nodes = [
        ("Conv", ["x", "w", "b"], "a", {"pads": [1, 1, 2, 2]}),
        ("Clip", ["a", "low", "high"], "c", {}),
        ("Conv", ["c", "v", "d"], "e", {"pads": [1, 1, 1, 1], "group": 5}),
        ("Add", ["c", "e"], "y", {}),
    ]
    small = RNG.standard_normal((5, 1, 3, 3)).astype(np.float32)
    small[2] *= 1e-9  # a channel that is all but switched off, beside its bias
    constants = {"w": WEIGHT, "b": BIAS, "v": small, "d": BIAS, "low": np.float32(0.0), "high": np.float32(6.0)}
    return graph(nodes, {name: np.asarray(array) for name, array in constants.items()}, ["batch", 3, 8, 12])


def test_convolutions_get_codes_and_their_activation_goes() -> None:
    model = two_convolutions()
    outputs = [*model.graph.output, *(onnx.ValueInfoProto(name=name) for name in ("c", "e"))]
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    del seen.graph.output[:]
    seen.graph.output.extend(outputs)
    session = ort.InferenceSession(seen.SerializeToString(), providers=["CPUExecutionProvider"])
    _, c, e = session.run(None, {"x": IMAGE})
    ends = {"x": IMAGE, "c": c, "e": e}
    observed = {name: Statistics(array.min().reshape(1), array.max().reshape(1)) for name, array in ends.items()}
    edited = ir.from_proto(model)
    assert convolution.map_tensors(edited.graph) == ["x", "c", "e"]
    names = convolution.quantize_convolutions(UnsignedQdqBuilder(edited.graph, observed), SCHEMES["w8a8-gemm"])
    assert names == ["node_a", "node_e"]
    made = checked(edited)
    assert operators(made) == Counter(Conv=2, QuantizeLinear=3, DequantizeLinear=7, Add=1)
    found, expected = run(made, x=IMAGE), session.run(None, {"x": IMAGE})[0]
    steps = [affine.asymmetric(float(array.min()), float(array.max())).scale for array in ends.values()]
    error = np.abs(found - expected)
    assert error.max() < 6 * max(steps)
    assert error.mean() < max(steps)
