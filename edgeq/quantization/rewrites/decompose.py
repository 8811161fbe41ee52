"""List the rewrites that decompose operators which integer-only runtimes do not have; they need no statistics.

Calibration runs them, too: the tensors inside get names of their own, by which they are observed.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from edgeq.graph import roles
from edgeq.graph.attention_mask import is_mask
from edgeq.graph.edit import Rewrites, constant, made_by, readers
from edgeq.graph.roles import Role
from edgeq.quantization.rewrites.add_zero_bias import add_zero_bias
from edgeq.quantization.rewrites.decompose_layer_normalization import decompose_layer_normalization
from edgeq.quantization.rewrites.decompose_rms_norm import decompose_rms_norm
from edgeq.quantization.rewrites.decompose_unit_length import decompose_unit_length
from edgeq.quantization.rewrites.divide_by_multiplying import divide_by_multiplying
from edgeq.quantization.rewrites.pick_last_token import pick_last_token
from edgeq.quantization.rewrites.repeat_kv_by_gather import repeat_kv_by_gather
from edgeq.quantization.rewrites.rotate_half_by_gather import rotate_half_by_gather
from edgeq.quantization.rewrites.rotation_by_gather import rotation_by_gather
from edgeq.quantization.rewrites.slice_counted_positions import slice_counted_positions
from edgeq.quantization.rewrites.take_first_token import take_first_token
from edgeq.quantization.rewrites.where_to_min import where_to_min

DECOMPOSE: tuple[Callable[[ir.Model], Rewrites], ...] = (
    decompose_layer_normalization,
    decompose_rms_norm,
    decompose_unit_length,
    take_first_token,  # before the last token: both replace GatherElements, and the first token's is the cheaper one
    pick_last_token,
    where_to_min,
    rotate_half_by_gather,  # needs the shapes that were inferred, so before nodes are added without them
    rotation_by_gather,  # what that left: rotations written in other operators, decided by computing them
    repeat_kv_by_gather,  # so does this
    slice_counted_positions,
    divide_by_multiplying,
    add_zero_bias,  # last: what the others write has no weights
)


def has_derived_statistics(node: ir.Node) -> bool:
    """Tell whether the statistics of a node's output follow from another tensor's, or nothing asks for them."""
    if node.op_type == "Mul":
        return roles.has(node, Role.NORM_GAIN)
    if node.op_type == "Add":
        is_biased = len(node.inputs) > 1 and constant(node.inputs[1]) is not None
        return is_biased and roles.has(made_by(node.inputs[0], "Mul"), Role.NORM_GAIN)
    following = readers(node.outputs[0])
    if node.op_type != "MatMul" or len(following) != 1 or following[0].op_type != "Add":
        return False
    is_scores = constant(node.inputs[1]) is None and any(map(is_mask, following[0].inputs))
    return is_scores or any(constant(value) is not None for value in following[0].inputs)
