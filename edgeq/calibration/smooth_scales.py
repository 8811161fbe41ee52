"""Move scale between tensors and weights (SmoothQuant), so that 8 bits suit both; FP32 stays the same.

Three exact rewrites of the float model, done once and shared by all backends:

- the few FFN neurons with outlier activations move to a small branch of their own
  (`edgeq.calibration.outlier_neurons`);
- per-channel scale moves from a tensor into the weights that read it (`smooth`): into the LayerNorm or the value
  weights where nothing else reads them, and behind one `Mul` where the residual stream is in the way;
- the mask gets a finite size that follows from the range of the scores (`size_mask`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.calibration.statistics import Statistics
from edgeq.graph import roles
from edgeq.graph.attention_mask import is_mask
from edgeq.graph.edit import add_constant, add_node, constant, is_read_once, made_by, replace_constant
from edgeq.graph.linear import Site, sites, value_projection
from edgeq.graph.rms_norm import root_mean_square
from edgeq.graph.roles import Role

SCALED = "/scaled"
EXP_UNDERFLOW = 30.0  # exp(-30) is 1e-13: below the rounding of a float32 sum


def smoothing_scales(site: Site, statistics: Statistics, swept: Statistics, alpha: float) -> NDArray[np.float64]:
    """Give the divisor of each channel: magnitude^alpha / weight^(1 - alpha), with geometric mean 1.

    Args:
        site: the tensor and the weights that read it.
        statistics: of the tensor on the calibration texts.
        swept: of the tensor on the vocabulary sweep. A channel that is near zero on the texts alone must not get a
            large scale: a new text would drive it past the range.
        alpha: 0 evens out the weights, 1 the tensor.

    Returns:
        float64[channels].

    Source: Xiao et al. 2023, SmoothQuant, equation 4.
    """
    largest = np.maximum(statistics.active_magnitudes, swept.active_magnitudes)
    rows = np.max([np.abs(weight).max(axis=1) for weight in site.weights()], axis=0).astype(np.float64)
    rows = np.maximum(rows, 1e-3 * max(float(np.median(rows)), 1e-9))
    scales: NDArray[np.float64] = largest**alpha / rows ** (1.0 - alpha)
    scales /= np.exp(np.mean(np.log(scales)))
    return scales


def smooth(
    graph: ir.Graph,
    observed: Mapping[str, Statistics],
    swept: Mapping[str, Statistics],
    alphas: Mapping[str, float],
) -> dict[str, Statistics]:
    """Divide each site's tensor per channel, and multiply the weights that read it.

    Args:
        graph: edited in place.
        observed: statistics of each site's tensor on the calibration texts, by name.
        swept: the same on the vocabulary sweep.
        alphas: by what makes the tensor; one without alpha is left alone.

    Returns:
        The statistics of the tensors that the products read now, by name: exact, because scaling is.
    """
    moved: dict[str, Statistics] = {}
    for site in list(sites(graph)):
        statistics = observed[site.name]
        if site.maker not in alphas:
            moved[site.name] = statistics
            continue
        scales = smoothing_scales(site, statistics, swept[site.name], alphas[site.maker])
        if not (_into_norm(graph, site, scales) or _into_value(graph, site, scales)):
            if site.maker == "context":
                moved[site.name] = statistics
                continue
            _behind_mul(graph, site, scales)
        for node in site.products:
            weight = constant(node.inputs[1])
            if weight is not None:
                replace_constant(graph, node, 1, (weight * scales[:, None]).astype(np.float32))
        name = str(site.products[0].inputs[0].name) if site.products[0].inputs[0] is not None else site.name
        moved[name] = Statistics(
            (statistics.minimum / scales).astype(np.float32), (statistics.maximum / scales).astype(np.float32)
        )
    return moved


def _into_norm(graph: ir.Graph, site: Site, scales: NDArray[np.float64]) -> bool:
    """Divide a normalisation's gain and bias, if nothing but the products reads it."""
    mean_square = root_mean_square(site.tensor.producer())
    if mean_square is not None and _only_products_read(site):
        gain = (mean_square.gain / scales).astype(np.float32)
        replace_constant(graph, mean_square.end, mean_square.position, gain)
        return True
    norm = made_by(site.tensor, "LayerNormalization")
    if norm is None or not _only_products_read(site):
        return False
    for position in (1, 2):
        array = constant(norm.inputs[position]) if len(norm.inputs) > position else None
        if array is not None:
            replace_constant(graph, norm, position, (array / scales).astype(np.float32))
    return True


def _into_value(graph: ir.Graph, site: Site, scales: NDArray[np.float64]) -> bool:
    """Divide the value weights: attention mixes positions, never channels."""
    if site.maker != "context" or not _only_products_read(site):
        return False
    values = value_projection(site)
    if values is None or values.weight.shape[1] != len(scales) or not is_read_once(values.output):
        return False
    replace_constant(graph, values.product, 1, (values.weight / scales).astype(np.float32))
    replace_constant(graph, values.end, values.bias_position, (values.bias / scales).astype(np.float32))
    return True


def _only_products_read(site: Site) -> bool:
    return {use.node for use in site.tensor.uses()} == set(site.products) and not site.tensor.is_graph_output()


def _behind_mul(graph: ir.Graph, site: Site, scales: NDArray[np.float64]) -> None:
    factor = add_constant(graph, f"{site.name}{SCALED}/factor", (1.0 / scales).astype(np.float32))
    name = f"{site.name}{SCALED}"
    scaled = add_node(site.products[0], "Mul", [site.tensor, factor], name, like=site.tensor, role=Role.SMOOTHED)
    for node in site.products:
        node.replace_input_with(0, scaled)


def score_tensors(graph: ir.Graph) -> list[str]:
    """Name the attention scores that the mask is added to."""
    return [
        str(value.name)
        for node in graph
        if node.op_type == "Softmax" and (add := made_by(node.inputs[0], "Add")) is not None
        if any(map(is_mask, add.inputs))
        for value in add.inputs
        if value is not None and not is_mask(value)
    ]


def size_mask(graph: ir.Graph, observed: Mapping[str, Statistics]) -> float | None:
    """Make the mask as large as the scores need and no larger.

    A masked score must stay 30 below the largest valid one, whatever the scores are: 1.5 times the observed range, for
    texts that were not observed, plus 30. Returns the size, or None when the graph has no mask or no scores.
    """
    names = [name for name in score_tensors(graph) if name in observed]
    masks = [node for node in graph if roles.has(node, Role.ATTENTION_MASK)]
    sizes = [value for node in masks for value in node.inputs if value is not None and constant(value) is not None]
    if not sizes or not names:
        return None
    low = min(float(observed[name].minimum.min()) for name in names)
    high = max(float(observed[name].maximum.max()) for name in names)
    size = float(np.ceil(1.5 * (high - low) + EXP_UNDERFLOW))
    for value in sizes:
        value.const_value = ir.Tensor(np.array(size, np.float32), name=value.name)
    return size
