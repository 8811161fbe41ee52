"""Write an equalised float model in the operators that a vendor's compiler reads; it decides codes itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from edgeq.calibration.statistics import Statistics, magnitudes
from edgeq.data.batches import AnyFeeds
from edgeq.graph import roles
from edgeq.graph.edit import checked, constant, readers
from edgeq.graph.linear import sites
from edgeq.passes.apply import apply_to
from edgeq.quantization.rewrites.vendor import vendor_passes
from edgeq.records import VendorForm

_IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10}  # Source: onnx 1.23, docs/Versioning.md, the table of releases


def vendor_form(
    model: onnx.ModelProto,
    observed: Mapping[str, Statistics],
    form: VendorForm,
    raised: Collection[str] = (),
    feeds: Sequence[AnyFeeds] = (),
) -> tuple[onnx.ModelProto, tuple[str, ...], tuple[str, ...]]:
    """Rewrite a model, exactly in FP32: one output, poolings that pick tokens made simple, an older opset.

    Where the compiler makes codes, scaled tensors come from a LayerNormalization of their own.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of the sums behind products.
        form: what the vendor's compiler reads.
        raised: products that stay float whatever the form says.
        feeds: probe batches on which each rewrite is proved; none where the same was proved before.

    Returns:
        A float model with `sentence_embedding` as its one output, the names of the products that the compiler is to
        make integer, and those of the weight products that stay float.

    Raises:
        Unsupported: an operator has no form in that opset.
        EdgeqError: a rewrite changed the FP32 function.
    """
    with_shapes = checked(ir.from_proto(model))  # of what equalising added
    read = _integer(ir.from_proto(with_shapes).graph, observed, form) - set(raised)
    graph_model, _ = apply_to(with_shapes, feeds, vendor_passes(form), dict(observed), outputs=1)
    graph = graph_model.graph
    _sort_constants(graph, {item.name for item in with_shapes.graph.initializer})
    graph_model.graph.opset_imports[""] = form.opset
    graph_model.ir_version = _IR_VERSIONS[form.opset]
    weighted = [str(node.name) for node in graph if node.op_type == "MatMul" and constant(node.inputs[1]) is not None]
    floats = tuple(name for name in weighted if name not in read)
    return roles.strip(checked(graph_model)), tuple(name for name in weighted if name in read), floats


def _integer(graph: ir.Graph, observed: Mapping[str, Statistics], form: VendorForm) -> set[str]:
    """Name the products that 8 bits suit.

    A product's output has one range for all channels: where one of them is far larger than the rest, theirs would be
    left with few codes. The side path of massive neurons is no token-level product, and stays float, too.
    """
    if form.dtype != "int8":
        return set()
    found = set()
    for node in (node for site in sites(graph) for node in site.products):
        following = readers(node.outputs[0])
        is_biased = len(following) == 1 and following[0].op_type == "Add"
        seen = observed.get(str((following[0] if is_biased else node).outputs[0].name))
        largest = magnitudes(seen) if seen is not None else np.ones(1)
        if largest.max() <= form.output_ratio_max * np.median(largest):
            found.add(str(node.name))
    return found


def _sort_constants(graph: ir.Graph, known: Collection[str]) -> None:
    """Order the constants that rewrites made by their first use: the order of rewrites then changes no byte."""
    used = (value for node in graph for value in node.inputs if value is not None)
    for name in dict.fromkeys(str(value.name) for value in used if constant(value) is not None):
        if name in graph.initializers and name not in known:
            graph.initializers[name] = graph.initializers.pop(name)
