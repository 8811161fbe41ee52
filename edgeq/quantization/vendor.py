"""Write an equalised float model in the operators that a vendor's compiler reads; it decides codes itself."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from edgeq.calibration.statistics import Statistics, magnitudes
from edgeq.errors import Unsupported
from edgeq.graph import roles
from edgeq.graph.edit import add_constant, add_node, checked, constant, made_by, readers, replace_uses
from edgeq.graph.linear import sites
from edgeq.quantization.rewrites.decompose_norms import first_token
from edgeq.quantization.rewrites.token_pooling import last_token
from edgeq.records import VendorForm

_IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10}  # Source: onnx 1.23, docs/Versioning.md, the table of releases


def vendor_form(
    model: onnx.ModelProto, observed: Mapping[str, Statistics], form: VendorForm, raised: Collection[str] = ()
) -> tuple[onnx.ModelProto, tuple[str, ...], tuple[str, ...]]:
    """Rewrite a model, exactly in FP32: one output, poolings that pick tokens made simple, an older opset.

    Where the compiler makes codes, scaled tensors come from a LayerNormalization of their own.

    Args:
        model: equalised FP32 ONNX; not changed.
        observed: statistics of the sums behind products.
        form: what the vendor's compiler reads.
        raised: products that stay float whatever the form says.

    Returns:
        A float model with `sentence_embedding` as its one output, the names of the products that the compiler is to
        make integer, and those of the weight products that stay float.

    Raises:
        Unsupported: an operator has no form in that opset.
    """
    graph_model = ir.from_proto(checked(ir.from_proto(model)))  # with the shapes of what equalising added
    graph = graph_model.graph
    read = _integer(graph, observed, form) - set(raised)
    while len(graph.outputs) > 1:
        graph.outputs.pop()
    for node in list(graph):
        if node.op_type == "GatherElements" and not first_token(graph, node):
            last_token(graph, node)
        elif node.op_type == "Gelu" and form.opset < 20:
            _gelu(graph, node)
        elif node.op_type == "Mul" and form.dtype == "int8":
            _norm_of_its_own(graph, node)
    for node in graph:
        if node.op_type == "LayerNormalization":  # a compiler may look for what ONNX lets one leave out
            node.attributes.setdefault("axis", ir.AttrInt64("axis", -1))
            node.attributes.setdefault("epsilon", ir.AttrFloat32("epsilon", 1e-5))
    RemoveUnusedNodesPass()(graph_model)
    TopologicalSortPass()(graph_model)
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


def _gelu(graph: ir.Graph, node: ir.Node) -> None:
    """Take GELU apart, which ONNX has as one operator from opset 20 on.

    Before::

        x ─ Gelu

    After::

        x ─┬─ Div(sqrt 2) ─ Erf ─ Add(1) ─┬─ Mul ─ Mul(0.5)
           └──────────────────────────────┘

    Raises:
        Unsupported: it is approximated.
    """
    x, name = node.inputs[0], str(node.outputs[0].name)
    kind = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
    if x is None or kind != "none":
        raise Unsupported(f"{node.name}: Gelu by {kind} has no form before opset 20. Take a target of another vendor.")
    numbers = {"root": math.sqrt(2.0), "one": 1.0, "half": 0.5}
    root, one, half = (_number(graph, f"gelu_{key}", number) for key, number in numbers.items())
    inner = add_node(node, "Div", [x, root], f"{name}/inner")
    error = add_node(node, "Erf", [inner], f"{name}/erf")
    share = add_node(node, "Add", [error, one], f"{name}/share")
    product = add_node(node, "Mul", [x, share], f"{name}/product")
    result = add_node(node, "Mul", [product, half], f"{name}/gelu")
    replace_uses(node.outputs[0], result)
    graph.remove(node, safe=True)


def _norm_of_its_own(graph: ir.Graph, node: ir.Node) -> None:
    """Give a scaled LayerNormalization a gain of its own: a compiler folds a Mul into weights, and undoes equalising.

    Before::

        x ─ LayerNormalization(gain, bias) ─┬─ Mul(factor) ─ MatMul
                                            └─ Add

    After::

        x ─┬─ LayerNormalization(gain · factor, bias · factor) ─ MatMul
           └─ LayerNormalization(gain, bias) ─ Add
    """
    for value, other in (tuple(node.inputs), tuple(reversed(node.inputs))):
        norm, factor = made_by(value, "LayerNormalization"), constant(other)
        arrays = [constant(item) for item in norm.inputs[1:]] if norm is not None else [None]
        parts = [array for array in arrays if array is not None]
        if norm is None or norm.inputs[0] is None or factor is None or len(parts) < len(arrays):
            continue
        if any(array.shape != factor.shape for array in parts):
            continue
        name = str(node.outputs[0].name)
        scaled = [
            add_constant(graph, f"{name}/{part}", (array * factor).astype(np.float32))
            for part, array in zip(("gain", "bias"), parts, strict=False)
        ]
        attributes = {key: item.value for key, item in norm.attributes.items() if item.value is not None}
        result = add_node(node, "LayerNormalization", [norm.inputs[0], *scaled], f"{name}/norm", attributes)
        replace_uses(node.outputs[0], result)
        graph.remove(node, safe=True)
        return


def _number(graph: ir.Graph, name: str, number: float) -> ir.Value:
    known = graph.initializers.get(name)
    return known if known is not None else add_constant(graph, name, np.array(number, np.float32))
