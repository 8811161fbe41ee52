"""Put codes on the attention mask: as what is added to scores, and as each token's share of the mean."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.errors import Unsupported
from edgeq.graph import roles
from edgeq.graph.edit import add_node, constant, made_by, readers
from edgeq.graph.roles import Role
from edgeq.quantization.affine import Affine
from edgeq.quantization.qdq import Coded, CodedGraph


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
        known = next((use for use in readers(shifted.inputs[0]) if roles.has(use, Role.KEPT_MASK)), None)  # type: ignore[union-attr,arg-type]
        if known is not None:
            return known.outputs[0]
        size = next(value for value in product.inputs if constant(value) is not None)  # type: ignore[union-attr]
        taken = any(value.name == "attention_lift" for value in self.values)
        name = f"attention_lift_{len(self.values)}" if taken else "attention_lift"
        lifted = add_node(product, "Mul", [shifted.inputs[0], size], name, role=Role.KEPT_MASK)  # type: ignore[union-attr,list-item,arg-type]
        self.values.add(lifted)
        return lifted

    def coded(self, value: ir.Value | None, codes: Affine, bits: int, node: ir.Node) -> Coded:
        """Give the mask's codes, made once for all its readers."""
        key = (value, bits)
        if key not in self._codes.converted:
            self._codes.converted[key] = self._codes.quantize(node, value, codes, bits, str(value.name))  # type: ignore[index,arg-type,union-attr]
        return self._codes.converted[key]  # type: ignore[index]
