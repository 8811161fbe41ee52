"""Write a rotation by position (RoPE) as two products and one Gather of channels, whatever an exporter wrote it in."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.graph.edit import Rewrites, add_constant, add_node, constant, dims, replace_uses, required
from edgeq.quantization.rewrites.rotation_parts import MOVED, WIDEST, Rotation, lanes_of, region_of, rotation_in


def rotation_by_gather(model: ir.Model) -> Rewrites:
    """Replace what rotates pairs of channels by `x * cosines + Gather(x) * sines`, FP32, exactly.

    Before::

        x ─ Slice, Split, Neg, Concat, Reshape, Mul(cos), Mul(sin), Sub, Add, in whatever order ─ y

    After::

        x ─┬─────────────────────────────── Mul(C) ─ Add ─ y
           └─ Gather(last axis, partners) ─ Mul(S) ──┘

    What is computed is decided by computing it: each lane of y must be made of the same lane of x and of one other at
    most, by factors that positions alone decide. C and S are those factors, computed by the operators of the rotation
    themselves, of ones in some lanes and zeros in the others. Moving values keeps their integers: a Neg, a Sub or a
    Concat would round them to another scale.
    """
    near: list[str] = []
    found: list[Rotation] = []
    done: set[ir.Node] = set()
    read = _read(model.graph)
    for node in reversed(list(model.graph)):
        region = region_of(node) if node in read and node not in done else None
        if region is None or not any(each.op_type in MOVED for each in region):
            continue
        done.update(region)
        rotation = rotation_in(region)
        if isinstance(rotation, Rotation):
            found.append(rotation)
        elif rotation:
            near.append(f"{node.name}: {rotation}")
    tables: dict[Signature, tuple[ir.Value, ir.Value]] = {}
    for rotation in reversed(found):  # in order: what a layer writes is read by those behind it
        _write(model.graph, rotation, tables)
    return Rewrites(len(found), tuple(near))


def _read(graph: ir.Graph) -> set[ir.Node]:
    """Collect the operators that an output depends on: what other rewrites replaced may still stand beside them."""
    found: set[ir.Node] = set()
    waiting: list[ir.Value | None] = list(graph.outputs)
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is not None and node not in found:
            found.add(node)
            waiting += node.inputs
    return found


Signature = tuple[object, ...]


def _write(graph: ir.Graph, rotation: Rotation, tables: dict[Signature, tuple[ir.Value, ir.Value]]) -> None:
    x, y, partner = rotation.x, rotation.y, rotation.partner
    end = required(y.producer())
    key = (_signature(rotation), partner.tobytes())
    if key not in tables:
        tables[key] = _tables(graph, rotation)
    own, other = tables[key]
    width = len(partner)
    name = f"partners_{width}"
    known = graph.initializers.get(name)
    is_known = known is not None and np.array_equal(constant(known), partner)  # type: ignore[arg-type]
    order = known if is_known and known is not None else add_constant(graph, name, partner)
    axis = len(dims(x) or ()) - 1
    turned = add_node(end, "Gather", [x, order], f"{end.name}/turned", {"axis": axis}, like=x)
    straight = add_node(end, "Mul", [x, own], f"{end.name}/straight", like=x)
    crossed = add_node(end, "Mul", [turned, other], f"{end.name}/crossed", like=x)
    replace_uses(y, add_node(end, "Add", [straight, crossed], f"{end.name}/rotated", like=x))


def _tables(graph: ir.Graph, rotation: Rotation) -> tuple[ir.Value, ir.Value]:
    """Write the factors of each lane itself and of its partner, float32[1, positions, lanes] with axes of 1 for heads.

    Ones in the lanes of one colour and zeros elsewhere, where no lane has its partner's colour, give in those lanes
    the first and in their partners' the second.
    """
    end, width = required(rotation.y.producer()), len(rotation.partner)
    colours = _colours(rotation.partner)
    rank = len(dims(rotation.x) or ())
    size = _size(graph, end, rotation)
    own: list[ir.Value] = []
    other: list[ir.Value] = []
    for colour in range(int(colours.max()) + 1):
        name = f"{end.name}/lanes_{colour}"
        lanes = np.asarray(colours == colour, np.float32).reshape([1] * (rank - 1) + [width])
        of_partner = lanes[..., rotation.partner] * (rotation.partner != np.arange(width))
        ones = add_constant(graph, name, lanes)
        partners = add_constant(graph, f"{name}/partners", of_partner.astype(np.float32))
        spread = add_node(end, "Expand", [ones, size], f"{name}/spread", like=rotation.x)
        result = _first_of_all(graph, end, _copied(end, rotation, spread, name), rotation.place, name)
        own.append(add_node(end, "Mul", [result, ones], f"{name}/own", like=result))
        other.append(add_node(end, "Mul", [result, partners], f"{name}/other", like=result))
    return _sum(end, own, "own"), _sum(end, other, "other")


def _size(graph: ir.Graph, end: ir.Node, rotation: Rotation) -> ir.Value:
    """Write the sizes of the rotated tensor, int64[axes], by those of the inputs: it is quantised itself."""
    ids, name = graph.inputs[0], f"{end.name}/size"
    parts: list[ir.Value] = []
    for axis, size in enumerate(lanes_of(rotation.x)):
        if size is None:
            first = 1 if axis else 0
            parts.append(add_node(end, "Shape", [ids], f"{name}_{axis}", {"start": first, "end": first + 1}))
        else:
            parts.append(add_constant(graph, f"{name}_{axis}", np.array([size], np.int64)))
    return add_node(end, "Concat", parts, name, {"axis": 0})


def _colours(partner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give each lane a number that its partner does not have, the smallest."""
    colours = np.full(len(partner), -1)
    neighbours = [
        {*np.flatnonzero(partner == lane).tolist(), int(partner[lane])} - {lane} for lane in range(len(partner))
    ]
    for lane, near in enumerate(neighbours):
        taken = {int(colours[each]) for each in near}
        colours[lane] = next(number for number in range(len(partner)) if number not in taken)
    return colours


def _copied(end: ir.Node, rotation: Rotation, start: ir.Value, name: str) -> ir.Value:
    """Write the operators of a rotation once more, of another value."""
    copies = {rotation.x: start}
    for node in rotation.nodes:
        inputs = [copies.get(value, value) if value is not None else None for value in node.inputs]
        copied = ir.node(
            node.op_type,
            inputs,
            attributes=dict(node.attributes),
            name=f"{name}/{node.name}",
            num_outputs=len(node.outputs),
        )
        for old, new in zip(node.outputs, copied.outputs, strict=True):
            new.name, new.type, new.shape = f"{name}/{old.name}", old.type, old.shape
            copies[old] = new
        required(end.graph).insert_before(end, copied)
    return copies[rotation.y]


def _first_of_all(graph: ir.Graph, end: ir.Node, value: ir.Value, place: int, name: str) -> ir.Value:
    """Take the first of each axis but those of positions and lanes: all are alike."""
    rank = len(dims(value) or ())
    axes = np.array([axis for axis in range(rank - 1) if axis != place], np.int64)
    bounds = [
        add_constant(graph, f"rotation_{part}_{rank}_{place}", array)
        for part, array in (("starts", np.zeros_like(axes)), ("ends", np.ones_like(axes)), ("axes", axes))
    ]
    first = add_node(end, "Slice", [value, *bounds], f"{name}/first")
    first.dtype = ir.DataType.FLOAT
    sizes = list(value.shape or ())
    first.shape = ir.Shape([1 if axis in axes else sizes[axis] for axis in range(rank)])
    return first


def _sum(end: ir.Node, parts: list[ir.Value], name: str) -> ir.Value:
    total = parts[0]
    for place, part in enumerate(parts[1:]):
        total = add_node(end, "Add", [total, part], f"{end.name}/{name}_{place}", like=total)
    return total


def _signature(rotation: Rotation) -> Signature:
    """Name what a rotation does: equal ones have equal tables."""
    names: dict[ir.Value, object] = {rotation.x: "x"}
    found: list[object] = [tuple(dims(rotation.x) or ())[1:]]
    for node in rotation.nodes:
        operands = tuple(names.get(value, _identity(value)) if value is not None else None for value in node.inputs)
        attributes = tuple((name, str(each.value)) for name, each in sorted(node.attributes.items()))
        names |= {value: (len(found), place) for place, value in enumerate(node.outputs)}
        found.append((node.op_type, attributes, operands))
    return tuple(found)


def _identity(value: ir.Value) -> object:
    array = constant(value)
    return id(value) if array is None or array.size > WIDEST else (array.shape, array.tobytes())
