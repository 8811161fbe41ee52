"""Pad keys, values and mask of attention to a multiple of 16 keys inside an OpenVINO model with dynamic shapes."""

from __future__ import annotations

from typing import Any

import numpy as np

KEYS = 16  # floats in a vector of AVX-512; a multiple of what narrower ones hold
_MASKED = -1e9  # added to the scores of added keys: exp gives 0


def pad_keys(model: Any) -> int:
    """Let every Softmax of attention see a multiple of 16 keys; give the number of them changed.

    The CPU plugin sums a row of Softmax in vectors, and what is left over apart: the last bits of a text's
    probabilities depend on the number of keys, so on its padding, and where a bit decides about one 8-bit code the
    vector moves by as much as quantising costs. Sums of whole vectors do not depend on zeros behind them.

    Before::

        MatMul(queries, keys) ─ Add(mask) ─ Softmax ─ MatMul(values)

    After::

        MatMul(queries, Pad(keys)) ─ Add(Pad(mask)) ─ Softmax ─ MatMul(Pad(values))

    Keys and values are padded in front of their Transpose, which the plugin fuses into its attention kernel.

    Args:
        model: an OpenVINO model of tokens with dynamic shapes; edited in place.
    """
    padding = _Padding(model)
    changed = 0
    for softmax in model.get_ordered_ops():
        found = _attention(softmax)
        if found is None:
            continue
        scores, masked, place, mixed = found
        is_turned = bool(scores.get_attributes()["transpose_b"])
        scores.input(1).replace_source_output(padding.of_keys(scores.input_value(1), -2 if is_turned else -1))
        masked.input(place).replace_source_output(padding.of(masked.input_value(place), -1, _MASKED))
        mixed.input(1).replace_source_output(padding.of_keys(mixed.input_value(1), -2))
        changed += 1
    model.validate_nodes_and_infer_types()
    return changed


def _attention(softmax: Any) -> tuple[Any, Any, int, Any] | None:
    """Give the MatMul of scores, the Add of the mask, the mask's place, and the MatMul with values; None elsewhere."""
    if softmax.get_type_name() != "Softmax":
        return None
    masked = softmax.input_value(0).get_node()
    readers = [target.get_node() for target in softmax.output(0).get_target_inputs()]
    if masked.get_type_name() != "Add" or len(readers) != 1 or readers[0].get_type_name() != "MatMul":
        return None
    sources = [masked.input_value(place) for place in (0, 1)]
    place = 1 if sources[0].get_node().get_type_name() == "MatMul" else 0
    scores, mixed = sources[1 - place].get_node(), readers[0]
    if scores.get_type_name() != "MatMul" or mixed.get_attributes()["transpose_b"]:
        return None
    last = sources[place].get_partial_shape()[-1]  # a mask that is one number for all keys would be stretched
    is_by_key = last.is_dynamic and len(masked.output(0).get_partial_shape()) == 4
    return (scores, masked, place, mixed) if is_by_key else None


class _Padding:
    """Pad tensors once for all their readers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._count: Any = None
        self._padded: dict[tuple[str, int, int], Any] = {}

    def of(self, output: Any, axis: int, value: float) -> Any:
        """Pad an axis of a float32 tensor up to a multiple of 16."""
        from openvino import opset13

        rank = len(output.get_partial_shape())
        axis %= rank
        key = (output.get_node().get_name(), output.get_index(), axis)
        if key not in self._padded:
            ends = [opset13.constant(np.zeros(1, np.int64))] * rank
            ends[axis] = self._missing()
            begin = opset13.constant(np.zeros(rank, np.int64))
            fill = opset13.constant(np.float32(value))
            self._padded[key] = opset13.pad(output, begin, opset13.concat(ends, 0), "constant", fill).output(0)
        return self._padded[key]

    def of_keys(self, output: Any, axis: int) -> Any:
        """Pad the axis of the keys with zeros; in front of a Transpose with a constant order."""
        from openvino import opset13

        transpose = output.get_node()
        order = transpose.input_value(1).get_node() if transpose.get_type_name() == "Transpose" else None
        if order is None or order.get_type_name() != "Constant":
            return self.of(output, axis, 0.0)
        axes = [int(item) for item in order.data]
        before = self.of(transpose.input_value(0), axes[axis % len(axes)], 0.0)
        turned = opset13.transpose(before, opset13.constant(np.array(axes)))
        turned.set_friendly_name(transpose.get_friendly_name())
        return turned.output(0)

    def _missing(self) -> Any:
        """Count the keys that are missing to a multiple of 16, int64[1]."""
        from openvino import opset13

        if self._count is None:
            shape = opset13.shape_of(self._model.inputs[0], output_type="i64")
            keys = opset13.gather(shape, opset13.constant(np.array([1])), opset13.constant(np.int64(0)))
            negative = opset13.multiply(keys, opset13.constant(np.array([-1])))
            self._count = opset13.floor_mod(negative, opset13.constant(np.array([KEYS])))
        return self._count
