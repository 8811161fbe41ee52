"""Write the attributes of LayerNormalization that ONNX lets one leave out."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.calibration.statistics import Observed
from edgeq.graph.edit import Rewrites


def write_norm_defaults(model: ir.Model, statistics: Observed) -> Rewrites:
    """Write axis -1 and epsilon 1e-5 on every LayerNormalization without them: a compiler may look for them."""
    count = 0
    for node in model.graph:
        if node.op_type == "LayerNormalization":
            lacking = {"axis", "epsilon"} - set(node.attributes)
            node.attributes.setdefault("axis", ir.AttrInt64("axis", -1))
            node.attributes.setdefault("epsilon", ir.AttrFloat32("epsilon", 1e-5))
            count += bool(lacking)
    return Rewrites(count)
