"""Put QuantizeLinear and DequantizeLinear with uint8 and uint16 parameters on the tensors of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeq.quantization import affine
from edgeq.quantization.affine import Affine
from edgeq.quantization.htp import unsupported
from edgeq.quantization.qdq import CodedGraph

UNSIGNED_DTYPES: Mapping[int, type[np.integer[Any]]] = {8: np.uint8, 16: np.uint16}


class UnsignedGraph(CodedGraph):
    """The same with unsigned codes, whose zero point is wherever the range puts it, in 16 bits too: HTP's."""

    dtypes = UNSIGNED_DTYPES

    def refusal(self, node: ir.Node, found: str) -> str:
        """Write why a node cannot be coded: the part of the model, its module, and the way out."""
        return unsupported.refusal(node, found)

    def cover(self, low: float, high: float, bits: int) -> Affine:
        """Give codes for a range."""
        return affine.asymmetric(low, max(high, low + 1e-9), bits)

    def wider(self, codes: Affine) -> Affine:
        """Give 16-bit codes for all that 8-bit codes hold: 257 steps for each, so that both hold the same values."""
        return Affine(codes.scale / 257, codes.zero_point * 257, 0, 65535)
