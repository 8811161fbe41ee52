"""Build a two-layer encoder from a fixed seed, as ONNX in the dialect of float models, without torch."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.graph import roles
from edgeq.graph.roles import Role

VOCABULARY, DIM, HEADS, HIDDEN, LONGEST = 300, 64, 4, 256, 48


class Builder:
    """Collect nodes and weights."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, NDArray[np.generic]] = {}

    def weight(self, name: str, *shape: int, spread: float = 0.08) -> str:
        self.weights[name] = (self.rng.standard_normal(shape) * spread).astype(np.float32)
        return name

    def constant(self, name: str, array: NDArray[np.generic]) -> str:
        self.weights[name] = array
        return name

    def node(self, op_type: str, inputs: list[str], name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def linear(self, x: str, name: str, rows: int, columns: int) -> str:
        product = self.node(
            "MatMul", [x, self.weight(f"{name}.weight", rows, columns, spread=rows**-0.5)], f"{name}.product"
        )
        self.nodes[-1].name = name
        return self.node("Add", [product, self.weight(f"{name}.bias", columns)], name + ".out")

    def norm(self, x: str, name: str) -> str:
        gain = self.constant(f"{name}.weight", (1 + 0.2 * self.rng.standard_normal(DIM)).astype(np.float32))
        return self.node("LayerNormalization", [x, gain, self.weight(f"{name}.bias", DIM)], name, axis=-1)


def encoder(
    seed: int = 0, outliers: bool = True, dense: bool = False, pooling: str = "mean", attention: str = "all"
) -> onnx.ModelProto:
    """Give an encoder with masked attention, pooling, optional Dense, and normalisation.

    The vector is the mean of all tokens, the first token, taken by a `slice` or a `lookup`, or the `last`. A token sees
    `all`, those before it (`causal`), or those up to three places away (`local`).

    With outliers, two FFN neurons of the first layer fire 40 times as hard as the rest, as real models' do.
    """
    b = Builder(seed)
    b.constant("one", np.array(1, np.float32))
    for name, numbers in (
        ("axes12", [1, 2]),
        ("axis1", [1]),
        ("axis2", [2]),
        ("start", [0]),
        ("to_heads", [0, 0, HEADS, DIM // HEADS]),
        ("from_heads", [0, 0, DIM]),
    ):
        b.constant(name, np.array(numbers, np.int64))
    b.constant("attention_mask_size", np.array(1e4, np.float32))
    mask = b.node("Cast", ["attention_mask"], "mask", to=TensorProto.FLOAT)
    seen = _seen(b, b.node("Unsqueeze", [mask, "axes12"], "mask4"), attention)
    bias = b.node("Sub", [seen, "one"], "mask_shifted")
    bias = b.node("Mul", [bias, "attention_mask_size"], "attention_bias")
    roles.note(b.nodes[-1], Role.ATTENTION_MASK)
    x = b.node("Gather", [b.weight("words", VOCABULARY, DIM, spread=0.5), "input_ids"], "looked_up")
    length = b.node("Shape", ["input_ids"], "length", start=1, end=2)
    rows = b.node("Slice", [b.weight("positions", 1, LONGEST, DIM), "start", length, "axis1"], "rows")
    x = b.norm(b.node("Add", [x, rows], "embedded"), "norm")
    for layer in range(2):
        x = _layer(b, x, f"layer.{layer}")
    if outliers:
        b.weights["layer.0.ffn.weight"][:, [3, 77]] *= 40.0
        b.weights["layer.0.ffn_out.weight"][[3, 77]] *= 4.0
    x = _pooled(b, x, mask, pooling)
    if dense:
        x = b.node("Tanh", [b.linear(x, "dense", DIM, DIM)], "dense.tanh")
    b.node("Div", [x, b.node("ReduceL2", [x, "axis1"], "length2", keepdims=1)], "sentence_embedding")
    return _model(b)


def _seen(b: Builder, mask: str, attention: str) -> str:
    """Multiply the mask by where each token may look."""
    if attention == "all":
        return mask
    for name, number in (("first_place", 0), ("one_place", 1), ("near", 3)):
        b.constant(name, np.array(number, np.int64))
    size = b.node("Squeeze", [b.node("Shape", ["input_ids"], "places", start=1, end=2)], "size")
    across = b.node("Range", ["first_place", size, "one_place"], "across")
    down = b.node("Unsqueeze", [across, "axis1"], "down")
    distance = [b.node("Abs", [b.node("Sub", [across, down], "apart")], "distance"), "near"]
    may = b.node("LessOrEqual", [across, down] if attention == "causal" else distance, "may")
    return b.node("Mul", [mask, b.node("Cast", [may], "allowed", to=TensorProto.FLOAT)], "limited")


def _pooled(b: Builder, x: str, mask: str, pooling: str) -> str:
    if pooling == "lookup":
        return b.node("Gather", [x, b.constant("first_place", np.array(0, np.int64))], "pooled", axis=1)
    if pooling == "slice":
        x = b.node("Slice", [x, "start", b.constant("end", np.array([1], np.int64)), "axis1"], "pooled3")
    elif pooling == "mean":
        weights = b.node("Unsqueeze", [mask, "axis1"], "mask3")
        count = b.node("ReduceSum", [weights, "axis2"], "count", keepdims=1)
        x = b.node("MatMul", [b.node("Div", [weights, count], "shares"), x], "pooled3")
    else:
        count = b.node("ReduceSum", ["attention_mask", "axis1"], "count", keepdims=1)
        seen = b.node("CumSum", ["attention_mask", b.constant("tokens_axis", np.array(1, np.int64))], "seen")
        is_last = b.node("Cast", [b.node("Equal", [seen, count], "is_last")], "last_or_padding", to=TensorProto.INT64)
        shares = b.node("Mul", [is_last, "attention_mask"], "last")
        shares = b.node("Unsqueeze", [b.node("Cast", [shares], "shares", to=TensorProto.FLOAT), "axis1"], "shares3")
        x = b.node(
            "MatMul", [shares, x], "pooling/last/picked"
        )  # as edgeq.quantization.rewrites.pick_last_token writes it
        roles.note(b.nodes[-1], Role.POOLING, Role.PICKED_TOKEN)
    return b.node("Squeeze", [x, "axis1"], "pooled")


def _layer(b: Builder, x: str, name: str) -> str:
    heads = []
    for part, order in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        y = b.linear(x, f"{name}.{part}", DIM, DIM)
        heads.append(
            b.node(
                "Transpose",
                [
                    b.node("Reshape", [y, "to_heads"], f"{y}.split"),
                ],
                f"{y}.heads",
                perm=order,
            )
        )
    scores = b.node("Add", [b.node("MatMul", heads[:2], f"{name}.scores"), "attention_bias"], f"{name}.masked")
    context = b.node("MatMul", [b.node("Softmax", [scores], f"{name}.softmax", axis=-1), heads[2]], f"{name}.context")
    context = b.node("Transpose", [context], f"{name}.context_back", perm=[0, 2, 1, 3])
    context = b.node("Reshape", [context, "from_heads"], f"{name}.context_flat")
    x = b.norm(b.node("Add", [b.linear(context, f"{name}.out", DIM, DIM), x], f"{name}.sum"), f"{name}.norm")
    hidden = b.node("Gelu", [b.linear(x, f"{name}.ffn", DIM, HIDDEN)], f"{name}.gelu")
    return b.norm(b.node("Add", [b.linear(hidden, f"{name}.ffn_out", HIDDEN, DIM), x], f"{name}.sum2"), f"{name}.norm2")


def _model(b: Builder) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "sequence"])
        for n in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", DIM])
    graph = helper.make_graph(
        b.nodes, "encoder", inputs, [output], [numpy_helper.from_array(a, n) for n, a in b.weights.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def tokens(seed: int, count: int, longest: int = LONGEST) -> tuple[tuple[int, ...], ...]:
    """Draw token ids of texts with 3 to `longest` tokens."""
    rng = np.random.default_rng(seed)
    return tuple(tuple(int(t) for t in rng.integers(1, VOCABULARY, rng.integers(3, longest + 1))) for _ in range(count))
