"""Quantise the attention mask to unsigned integers, looked up by the mask itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.errors import Unsupported
from edgeq.graph.edit import add_constant, add_node
from edgeq.quantization.htp.unsupported import known_part, refusal
from edgeq.quantization.integer.attention_mask import Masks
from edgeq.quantization.qdq import Coded, CodedGraph

LONGEST = 512  # tokens that can be counted where no table of positions says how many there can be


class LookedUpMasks(Masks):
    """Look the mask's codes up by the mask itself: no float tensor is made on the way."""

    def __init__(self, codes: CodedGraph) -> None:
        """Begin with the graph's input."""
        super().__init__(codes)
        self.longest = LONGEST

    def lowered(self, mask: ir.Value | None, bits: int, node: ir.Node) -> Coded:
        """Give what is added to scores [batch, heads, sequence, sequence], made once for all layers.

        Raises:
            Unsupported: the mask has another form.
        """
        key = (mask, bits)
        if key not in self._codes.converted:
            if known_part(node):  # more is masked than padding
                raise Unsupported(refusal(node))
            size, stem = self.size(mask), f"{mask.name}/{bits}bit"  # type: ignore[union-attr]
            (tokens,) = (item for item in self._codes.graph.inputs if item.name == "attention_mask")
            rows = self._look_up(tokens, (-size, 0.0), bits, node, stem)
            axes = add_constant(self._codes.graph, f"{stem}/axes", np.array([1, 2], np.int64))
            spread = add_node(node, "Unsqueeze", [rows.value, axes], f"{stem}/spread")
            self._codes.store(spread.producer(), spread, rows.affine, bits)  # type: ignore[arg-type]
            self._codes.converted[key] = self._codes.coded[spread]  # type: ignore[index]
        return self._codes.converted[key]  # type: ignore[index]

    def share(self, value: ir.Value | None) -> Coded:
        """Give each token's share in the pooling, in 16 bits, coded step by step from the mask on.

        Raises:
            Unsupported: a step has no integer form.
        """
        node = value.producer() if value is not None else None
        if value is None or node is None:
            raise Unsupported("pooling reads the attention mask itself; a mask made float is needed")
        if value in self._codes.coded:
            return self._codes.coded[value]
        if node.op_type == "Cast" and node.inputs[0] is not None:
            coded = self._look_up(node.inputs[0], (0.0, 1.0), 16, node, f"{node.name}/ones")
        elif node.op_type in ("Clip", "Max"):  # against division by zero: a text has tokens
            coded = self.share(node.inputs[0])
        else:
            coded = self._step(node, value)
        self._codes.coded[value] = coded
        return coded

    def _step(self, node: ir.Node, value: ir.Value) -> Coded:
        """Code one operator whose operands all follow from the mask."""
        operands = [self.share(operand) for operand in node.inputs[: 2 if node.op_type == "Div" else 1]]
        for position, operand in enumerate(operands):
            node.replace_input_with(position, operand.value)
        tops = {"ReduceSum": float(self.longest), "Div": 1.0}
        if node.op_type in tops:
            codes = self._codes.cover(0.0, tops[node.op_type], 16)
        elif node.op_type in ("Unsqueeze", "Transpose", "Squeeze", "Reshape"):
            codes = operands[0].affine
        else:
            raise Unsupported(refusal(node, f"{node.op_type} of the attention mask has no form for HTP"))
        self._codes.store(node, value, codes, 16)
        return self._codes.coded[value]

    def _look_up(self, mask: ir.Value, ends: tuple[float, float], bits: int, node: ir.Node, name: str) -> Coded:
        """Give one value for 0 and another for 1: both have exact codes."""
        table = self._codes.table(f"{name}/table", np.array(ends, np.float32), bits, node)
        rows = add_node(node, "Gather", [table.value, mask], f"{name}/rows")
        self._codes.store(rows.producer(), rows, table.affine, bits)  # type: ignore[arg-type]
        return self._codes.coded[rows]
