"""Drop nodes and constants that nothing reads."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgeq.graph.edit import Rewrites


def drop_unused_nodes(model: ir.Model) -> Rewrites:
    """Remove every node and constant that no output depends on; give how many nodes there were.

    Before::

        x ─┬─ Relu ─ y
           └─ Neg ─ Exp

    After::

        x ─ Relu ─ y
    """
    before = len(model.graph)
    RemoveUnusedNodesPass()(model)
    return Rewrites(before - len(model.graph))
