"""Rewrites of maps for integer runtimes: pixels from 0 to 255, patches by a convolution, channels last."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from test_passes import graph, operators, rewritten, run

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.data.batches import PIXELS
from edgeq.graph import pixels, roles
from edgeq.graph.roles import Role
from edgeq.passes.patch_product import patch_product
from edgeq.quantization.rewrites.copied_axes import copied_axes
from edgeq.quantization.rewrites.maps_channels_last import maps_channels_last
from edgeq.quantization.rewrites.patch_convolution import PATCHES, patch_convolution
from edgeq.quantization.rewrites.raw_pixels import raw_pixels

RNG = np.random.default_rng(0)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
FACTOR, OFFSET = 1.0 / 255.0 / STD, -MEAN / STD
CODES = RNG.integers(0, 256, (2, 3, 8, 12)).astype(np.float32)
IMAGE = (CODES * FACTOR[:, None, None] + OFFSET[:, None, None]).astype(np.float32)
WEIGHT = RNG.standard_normal((5, 3, 3, 3)).astype(np.float32)
BIAS = RNG.standard_normal(5).astype(np.float32)


def of_images(nodes: list, constants: dict[str, np.ndarray]) -> onnx.ModelProto:  # type: ignore[type-arg]
    """Make a model whose one input is pixels, with their normalisation in its metadata."""
    model = graph(nodes, constants, ["batch", 3, 8, 12])
    model.graph.input[0].name = PIXELS
    for node in model.graph.node:
        node.input[:] = [PIXELS if name == "x" else name for name in node.input]
    pixels.note(model, FACTOR, OFFSET)
    return model


def convolved(**more: object) -> onnx.ModelProto:
    return of_images([("Conv", ["x", "w", "b"], "y", more)], {"w": WEIGHT, "b": BIAS})


@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [2, 0, 1, 3]])
@pytest.mark.parametrize("strides", [[1, 1], [2, 2]])
def test_the_normalisation_is_folded_exactly_at_the_border_too(pads: list[int], strides: list[int]) -> None:
    model = convolved(pads=pads, strides=strides)
    statistics: Observed = {}
    found, done = rewritten(model, partial(raw_pixels, statistics=statistics))
    assert done.count == 1
    assert operators(found)["Pad"] == int(any(pads))
    made, expected = run(found, pixel_values=IMAGE), run(model, pixel_values=IMAGE)
    for part in (np.s_[..., 0, :], np.s_[..., -1, :], np.s_[..., 0], np.s_[..., -1], np.s_[...]):
        np.testing.assert_allclose(made[part], expected[part], atol=2e-4)


def test_without_the_plane_the_border_would_be_wrong() -> None:
    model = convolved(pads=[1, 1, 1, 1])
    found, _ = rewritten(model, partial(raw_pixels, statistics={}))
    for tensor in found.graph.initializer:
        if tensor.name.endswith("/of_pixels"):
            weight = numpy_helper.to_array(tensor).copy()
            weight[:, 3] = weight[:, 3].mean(axis=(1, 2), keepdims=True)  # as if the sum were one bias for all places
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    made, expected = run(found, pixel_values=IMAGE), run(model, pixel_values=IMAGE)
    np.testing.assert_allclose(made[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=2e-4)
    assert np.abs(made - expected)[..., 0, :].max() > 0.1


def test_pixels_that_something_else_reads_stay_normalised() -> None:
    nodes = [
        ("Conv", ["x", "w", "b"], "m", {"pads": [1] * 4}),
        ("ReduceMean", ["x"], "n", {}),
        ("Add", ["m", "n"], "y", {}),
    ]
    _, done = rewritten(of_images(nodes, {"w": WEIGHT, "b": BIAS}), partial(raw_pixels, statistics={}))
    assert done.count == 0
    bare = convolved()
    del bare.metadata_props[:]
    assert rewritten(bare, partial(raw_pixels, statistics={}))[1].count == 0  # nobody knows how they are normalised


def test_the_normalisation_is_in_no_shipped_model() -> None:
    model = convolved()
    assert pixels.of(ir.from_proto(model)) is not None
    assert not roles.strip(model).metadata_props
    assert pixels.of(ir.from_proto(model)) is None


def patches() -> onnx.ModelProto:
    weight = RNG.standard_normal((5, 3, 4, 4)).astype(np.float32)
    nodes = [
        ("Conv", ["x", "w", "b"], "maps", {"strides": [4, 4]}),
        ("Reshape", ["maps", "shape"], "flat", {}),
        ("Transpose", ["flat"], "y", {"perm": [0, 2, 1]}),
    ]
    return of_images(nodes, {"w": weight, "b": BIAS, "shape": np.array([0, 5, 6], np.int64)})


def test_patches_are_a_convolution_again_with_the_moments_of_pixels() -> None:
    given = patches()
    model, _ = rewritten(given, patch_product)
    name = next(node.input[0] for node in model.graph.node if node.op_type == "MatMul")
    cut = CODES.reshape(2, 3, 2, 4, 3, 4).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 48).astype(np.float64)
    rows = cut * np.repeat(FACTOR, 16) + np.repeat(OFFSET, 16)
    seen = Statistics(rows.min(0), rows.max(0))
    seen.mean, seen.moment = rows.mean(0), rows.T @ rows / len(rows)
    statistics: Observed = {name: seen}
    found, done = rewritten(model, partial(patch_convolution, statistics=statistics))
    assert done.count == 1 and operators(found) == Counter(Conv=1, Reshape=1, Transpose=1)
    np.testing.assert_allclose(run(found, pixel_values=IMAGE), run(given, pixel_values=IMAGE), atol=1e-4)
    rewritten(found, partial(raw_pixels, statistics=statistics))
    (made,) = (item for key, item in statistics.items() if key.endswith(PATCHES) and key != name)
    np.testing.assert_allclose(made.mean, cut.mean(0), rtol=1e-4)
    np.testing.assert_allclose(made.moment, cut.T @ cut / len(cut), rtol=1e-3)


def maps() -> onnx.ModelProto:
    depthwise = RNG.standard_normal((5, 1, 3, 3)).astype(np.float32)
    nodes = [
        ("Conv", ["x", "w", "b"], "a", {"pads": [1] * 4}),
        ("Relu", ["a"], "r", {}),
        ("Conv", ["r", "v"], "c", {"pads": [1] * 4, "group": 5}),
        ("Mul", ["c", "gain"], "g", {}),
        ("Add", ["r", "g"], "s", {}),
        ("MaxPool", ["s"], "p", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("ReduceMean", ["p", "axes"], "y", {"keepdims": 0}),
    ]
    gain = RNG.standard_normal((1, 5, 1, 1)).astype(np.float32)
    return of_images(nodes, {"w": WEIGHT, "b": BIAS, "v": depthwise, "gain": gain, "axes": np.array([2, 3], np.int64)})


def test_channels_stand_last_and_transposes_stand_around_windows_alone() -> None:
    model = maps()
    statistics: Observed = {"r": Statistics(np.zeros(5, np.float32), np.ones(5, np.float32))}
    found, done = rewritten(model, partial(maps_channels_last, statistics=statistics))
    assert done.count == 7
    assert operators(found) == Counter(Conv=2, Relu=1, Mul=1, Add=1, MaxPool=1, ReduceMean=1, Transpose=7)
    np.testing.assert_allclose(run(found, pixel_values=IMAGE), run(model, pixel_values=IMAGE), atol=1e-5)
    around = [node for node in ir.from_proto(found).graph if roles.has(node, Role.MAP_ORDER)]
    assert len(around) == 6  # before and behind each window; the seventh turns the image
    assert statistics["r"].maximum.shape == (5,)


def test_maps_of_what_is_no_image_stay() -> None:
    model = maps()
    model.graph.input[0].name = "x"
    for node in model.graph.node:
        node.input[:] = ["x" if name == PIXELS else name for name in node.input]
    assert rewritten(model, partial(maps_channels_last, statistics={}))[1].count == 0


def test_a_shape_copies_what_it_can() -> None:
    nodes = [("Reshape", ["x", "shape"], "y", {})]
    model = of_images(nodes, {"shape": np.array([0, 3, 2, 48], np.int64)})
    found, done = rewritten(model, copied_axes)
    assert done.count == 1
    shapes = [numpy_helper.to_array(item).tolist() for item in found.graph.initializer]
    assert [0, 0, 2, 48] in shapes
    np.testing.assert_array_equal(run(found, pixel_values=IMAGE), run(model, pixel_values=IMAGE))
