"""Centre and even out the values that attention mixes, before they are quantised to 8 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.calibration.statistics import Observed, Statistics
from edgeq.graph.edit import Rewrites, constant, is_read_once, made_by, required
from edgeq.graph.linear import Site, sites, value_projection
from edgeq.quantization.rewrites.affine_statistics import affine
from edgeq.quantization.rewrites.product_bias import bias_add, put_constant, shift_input


def center_values(model: ir.Model, statistics: Observed) -> Rewrites:
    """Subtract its mean from each channel of attention's values, and scale all channels to one magnitude.

    Before::

        x ─ MatMul(Wv) ─ Add(bv) ─ mixed by attention ─ MatMul(Wo) ─ Add(bo)

    After::

        x ─ MatMul(Wv / f) ─ Add((bv - m) / f) ─ mixed by attention ─ MatMul(f Wo) ─ Add(bo + m Wo)

    Attention's probabilities add up to one, so that the mean passes through unchanged. An 8-bit softmax's add up to
    less where a long text spreads them thin: what is lost of a centred value is little.
    """
    graph = model.graph
    count, near = 0, []
    for site in list(sites(graph)):
        values = value_projection(site)
        if values is None:
            continue
        name = str(values.output.name)
        if not is_read_once(values.output):
            near.append(f"{name}: the values are read elsewhere too")
            continue
        seen = statistics[name]
        if seen.mean is None or any(bias_add(node) is None for node in site.products):
            near.append(f"{name}: their mean was not observed, or the products behind attention have no bias")
            continue
        mean = seen.mean.astype(np.float64)
        largest = np.maximum(np.maximum(mean - seen.minimum, seen.maximum - mean), 1e-6)
        factors = largest / np.exp(np.mean(np.log(largest)))
        for node in site.products:
            shift_input(graph, node, mean)
            put_constant(graph, node, 1, required(constant(node.inputs[1])) * factors[:, None])
        put_constant(graph, values.product, 1, values.weight / factors)
        put_constant(graph, values.end, values.bias_position, (values.bias - mean) / factors)
        statistics[name] = affine(seen, 1.0 / factors, -mean / factors)
        even = statistics[site.name] = affine(statistics[site.name], 1.0 / factors, -mean / factors)
        mixed = _mixed(site)
        statistics[str(mixed.name)] = Statistics(even.minimum.min(keepdims=True), even.maximum.max(keepdims=True))
        count += 1
    return Rewrites(count, tuple(near))


def _mixed(site: Site) -> ir.Value:
    """Give the product of attention's probabilities and values that a context is."""
    value: ir.Value = site.tensor
    while (step := made_by(value, "Reshape", "Transpose")) is not None and step.inputs[0] is not None:
        value = step.inputs[0]
    return value
