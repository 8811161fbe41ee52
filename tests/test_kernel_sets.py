"""A whole file gives one vector in every kernel set that has its kernels; one that leaves something open does not.

The files are those of a small encoder, in each integer-only scheme.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest

pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")

import kernel_sets
from ai_edge_litert import schema_py_generated as schema
from tiny_integer import TOKENS, cosines, make_model

from edgeq.backends import tflite
from edgeq.backends.tflite import kernels
from edgeq.backends.tflite.emitter import Settings
from edgeq.backends.tflite.lowering import lower_model
from edgeq.data.sessions import Embeddings, embed_batches
from edgeq.data.tokens import batches
from edgeq.errors import LoweringFailed
from edgeq.system.worker import Worker

pytestmark = pytest.mark.tflite

LENGTH = 48
LITERT, OLD, NPU = (
    Settings(32, "cast", "roots"), Settings(32, "cast", "all", is_bias_stated=False), Settings(32, "quantize", "none"),
)  # fmt: skip
EVERY = {name for name in kernel_sets.BY_NAME if name != "tflite-micro"}
# A scheme, how it is written, and the kernel sets that have all of its kernels.
FORMS = {
    "w8a8-int": (LITERT, {name for name in EVERY if not name.startswith("tflite-runtime")}),
    "w8a16-int": (LITERT, {name for name in EVERY if not name.startswith("tflite-runtime")}),
    "w8a8-int-npu": (NPU, {"litert", "litert-builtin", "litert-reference", "litert-js"}),
    "w8a8-int, tflite-runtime": (OLD, {"tflite-runtime", "tflite-runtime-builtin", "litert", "litert-builtin"}),
}
# How far two kernel sets may be apart in their vectors. One rounds where another truncates, and layers make it larger.
NEAREST = {"w8a8-int": 0.995, "w8a16-int": 0.9995, "w8a8-int-npu": 0.995, "w8a8-int, tflite-runtime": 0.995}


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, Worker]]:
    """Keep one child process of each set for all files."""
    found: dict[str, Worker] = {}
    yield found
    for worker in found.values():
        worker.close()


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    name = str(request.param)
    model = make_model(name.partition(",")[0], tmp_path_factory.mktemp("model"))
    return name, lower_model(ir.load(model.file.path), (LENGTH,), FORMS[name][0])


def embed(data: bytes, kernel_set: kernel_sets.KernelSet, workers: dict[str, Worker], folder: Path) -> Embeddings:
    path = folder / f"{kernel_set}.tflite"
    path.write_bytes(data)
    parameters = tflite.output_params(path)
    path.write_bytes(kernel_set.file(data))
    worker = workers.setdefault(kernel_set.name, kernel_set.started())
    worker.call(do="load", path=str(path), threads=1)
    return embed_batches(tflite.TfliteSession(worker, (LENGTH,), parameters), batches(TOKENS), len(TOKENS.ids))


def has(kernel_set: kernel_sets.KernelSet, data: bytes) -> bool:
    needed = {kernel_sets.kernel(operator) for operator in kernels.read(data).operators}
    return needed.isdisjoint(kernel_set.lacks | kernel_set.gets_wrong)


def unstated(data: bytes) -> bytes:
    """Take away what says how many bits the biases of 16-bit products have."""
    model = kernel_sets.unpacked(data)
    for graph in model.subgraphs:
        for operator in graph.operators:
            if isinstance(operator.builtinOptions, schema.FullyConnectedOptionsT):
                operator.builtinOptions.quantizedBiasType = 0
    return kernel_sets.packed(model)


def farthest(found: dict[str, Embeddings]) -> float:
    """Give the mean cosine of the two kernel sets that are farthest apart."""
    return min(float(cosines(one, other).mean()) for one, other in itertools.combinations(found.values(), 2))


@pytest.mark.tensorflow
def test_every_kernel_set_gives_the_vectors_of_the_others(
    form: tuple[str, bytes], workers: dict[str, Worker], tmp_path: Path
) -> None:
    name, data = form
    able = [each for each in kernel_sets.SETS if has(each, data)]
    wanted = FORMS[name][1]
    assert wanted <= {each.name for each in able}
    found = {each.name: embed(data, each, workers, tmp_path) for each in able if each.name in wanted}
    assert farthest(found) > NEAREST[name]
    if name != "w8a8-int, tflite-runtime":  # its version of the product has no such field
        assert kernels.violations(kernels.read(data), "litert") == []


def test_a_file_that_leaves_its_biases_open_is_refused_and_shows(
    form: tuple[str, bytes], workers: dict[str, Worker], tmp_path: Path
) -> None:
    name, data = form
    damaged = unstated(data)
    if name != "w8a8-int, tflite-runtime":
        assert any("its bias is int32" in each for each in kernels.violations(kernels.read(damaged), "litert"))
    pair = [kernel_sets.BY_NAME[each] for each in ("litert", "litert-reference")]
    found = {each.name: embed(damaged, each, workers, tmp_path) for each in pair}
    assert farthest(found) < 0.9


def test_a_set_refuses_a_file_whose_kernels_it_lacks(
    form: tuple[str, bytes], workers: dict[str, Worker], tmp_path: Path
) -> None:
    micro = kernel_sets.BY_NAME["tflite-micro"]
    assert not has(micro, form[1])
    with pytest.raises(LoweringFailed, match="failed to allocate tensors"):
        embed(form[1], micro, workers, tmp_path)
