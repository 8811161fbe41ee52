"""Convert an integer input to float before it is unsqueezed: what follows then reads one Cast, and runs on the NPU."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.graph.edit import Rewrites, add_node, readers, replace_uses, required


def cast_before_unsqueeze(model: ir.Model) -> Rewrites:
    """Exchange Unsqueeze and Cast behind a graph input; give how many Casts moved.

    Before::

        attention_mask ─┬─ Cast ─ Unsqueeze ─ attention
                        └─ Unsqueeze ─ Cast ─ pooling

    After::

        attention_mask ─ Cast ─┬─ Unsqueeze ─ attention
                               └─ Unsqueeze ─ pooling
    """
    graph = model.graph
    count = 0
    for source in list(graph.inputs):
        behind = {
            node: unsqueeze
            for unsqueeze in readers(source) if unsqueeze.op_type == "Unsqueeze"
            for node in readers(unsqueeze.outputs[0]) if node.op_type == "Cast"
        }  # fmt: skip
        for to in sorted({node.attributes["to"].as_int() for node in behind}):
            casts = [node for node in (*readers(source), *behind) if node.op_type == "Cast"]
            alike = [node for node in dict.fromkeys(casts) if node.attributes["to"].as_int() == to]
            first = next(node for node in graph if source in node.inputs)
            numbers = add_node(first, "Cast", [source], f"{source.name}/numbers", {"to": to})
            numbers.shape, numbers.dtype = source.shape, ir.DataType(to)
            for node in alike:
                output, result = node.outputs[0], numbers
                if node in behind:
                    axes = required(behind[node].inputs[1])
                    result = add_node(node, "Unsqueeze", [numbers, axes], f"{output.name}/unsqueezed", like=output)
                    count += 1
                replace_uses(output, result)
                graph.remove(node, safe=True)
    return Rewrites(count)
