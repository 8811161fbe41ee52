"""Put codes on the attention mask: as what is added to scores, and as each token's share of the mean."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.errors import Unsupported
from edgeq.graph.edit import add_constant, add_node, constant, made_by, readers
from edgeq.quantization.affine import Affine
from edgeq.quantization.htp.unsupported import known_part, refusal
from edgeq.quantization.qdq import Coded, CodedGraph

LONGEST = 512  # tokens that can be counted where no table of positions says how many there can be


class Masks:
    """Hold which tensors follow from the attention mask alone, and their codes."""

    def __init__(self, codes: CodedGraph) -> None:
        """Begin with the graph's input."""
        self._codes = codes
        self.values: set[ir.Value] = {item for item in codes.graph.inputs if item.name == "attention_mask"}

    def size(self, mask: ir.Value | None) -> float:
        """Give how far below 0 a masked score is moved.

        Raises:
            Unsupported: the mask has another form.
        """
        product = made_by(mask, "Mul")
        size = (
            next((array for value in product.inputs if (array := constant(value)) is not None), None)
            if product
            else None
        )
        if size is None or size.size != 1:
            raise Unsupported("the attention mask is not of the form (mask - 1) * size")
        return float(size.reshape(-1)[0])

    def lifted(self, mask: ir.Value | None, node: ir.Node) -> ir.Value:
        """Lift what counts instead of lowering what does not: codes without zero point hold 0 and 1."""
        product = made_by(mask, "Mul")
        shifted = next(made_by(value, "Sub") for value in product.inputs if made_by(value, "Sub"))  # type: ignore[union-attr]
        known = next((use for use in readers(shifted.inputs[0]) if str(use.name).startswith("attention_lift")), None)  # type: ignore[union-attr,arg-type]
        if known is not None:
            return known.outputs[0]
        size = next(value for value in product.inputs if constant(value) is not None)  # type: ignore[union-attr]
        taken = any(value.name == "attention_lift" for value in self.values)
        name = f"attention_lift_{len(self.values)}" if taken else "attention_lift"
        lifted = add_node(product, "Mul", [shifted.inputs[0], size], name)  # type: ignore[union-attr,list-item,arg-type]
        self.values.add(lifted)
        return lifted

    def coded(self, value: ir.Value | None, codes: Affine, bits: int, node: ir.Node) -> Coded:
        """Give the mask's codes, made once for all its readers."""
        key = (value, bits)
        if key not in self._codes.converted:
            self._codes.converted[key] = self._codes.quantize(node, value, codes, bits, str(value.name))  # type: ignore[index,arg-type,union-attr]
        return self._codes.converted[key]  # type: ignore[index]


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
