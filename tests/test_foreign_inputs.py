"""ONNX files with other inputs or outputs than tokens and vectors are refused by what they are, with what to give."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgeq import cli
from edgeq.errors import Unsupported
from edgeq.frontend.onnx import interface

INT64, INT32, FLOAT = TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT
_BATCHED = ["batch", "sequence"]


def graph(inputs: dict[str, tuple[int, list[str | int]]], outputs: dict[str, list[str | int]]) -> onnx.ModelProto:
    """Make a graph with these inputs and outputs, and one operator between the first two."""
    made = helper.make_graph(
        [helper.make_node("Identity", [next(iter(inputs))], [next(iter(outputs))])],
        "given",
        [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)])


def refused(inputs: dict[str, tuple[int, list[str | int]]], softmax: bool = False) -> str:
    model = graph(inputs, {"vectors": ["batch", 8]})
    if softmax:
        model.graph.node.append(helper.make_node("Softmax", ["vectors"], ["unused"]))
    with pytest.raises(Unsupported) as found:
        interface.roles(ir.from_proto(model), "given")
    return str(found.value)


@pytest.mark.parametrize("dtype", [INT64, INT32])
@pytest.mark.parametrize("names", [("input_ids", "offsets"), ("input", "onnx::EmbeddingBag_1")])
def test_an_embedding_bag_is_named_with_the_directory_that_works(dtype: int, names: tuple[str, str]) -> None:
    bag: dict[str, tuple[int, list[str | int]]] = {names[0]: (dtype, ["n"]), names[1]: (dtype, ["b"])}
    message = refused(bag)
    assert "is an embedding bag" in message and f"{names[0]} ['n'] and {names[1]} ['b']" in message
    assert "StaticEmbedding" in message and "tokenizer.json" in message and "dynamic axes" not in message
    weighed = refused(bag | {"per_sample_weights": (FLOAT, ["n"])})
    assert "is an embedding bag" in weighed and "per_sample_weights ['n'] gives by token id, multiply" in weighed


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"input_ids": (INT64, ["n"])}, "one text without a batch axis"),
        ({"input_ids": (INT64, ["n"]), "attention_mask": (INT64, ["n"])}, "one text without a batch axis"),
        ({"input_ids": (INT64, [16])}, "one text without a batch axis"),
        ({"text": (TensorProto.STRING, ["batch"])}, "takes texts, so that the file holds its tokenizer"),
        ({"inputs_embeds": (FLOAT, [*_BATCHED, 8])}, "holds vectors"),
        (
            {"input_ids": (INT64, _BATCHED), "past_key_values.0.key": (FLOAT, ["batch", 4, "past", 8])},
            "use_cache=False",
        ),
        ({"input_ids": (INT64, _BATCHED), "decoder_input_ids": (INT64, _BATCHED)}, "is a decoder's"),
        ({"input_ids": (INT64, _BATCHED), "labels": (INT64, ["batch"])}, "one text without a batch axis"),
        ({"input_ids": (INT64, [*_BATCHED, "words"])}, "has the shape ['batch', 'sequence', 'words']"),
    ],
)
def test_other_inputs_are_named_for_what_they_are(inputs: dict[str, tuple[int, list[str | int]]], said: str) -> None:
    message = refused(inputs)
    assert said in message and "dynamic axes" not in message


def test_packed_texts_of_an_encoder_and_fixed_axes_have_their_own_advice() -> None:
    packed = refused({"input_ids": (INT64, ["total"]), "cu_seqlens": (INT32, ["b"])}, softmax=True)
    assert "embedding bag" not in packed and "Export the model again on padded texts" in packed
    assert "Export the model again with dynamic axes" in refused({"input_ids": (INT64, [1, 128])})


def test_the_head_of_a_task_is_not_taken_for_vectors() -> None:
    for shape in ([*_BATCHED, 30], ["batch", 2], ["batch", 1]):
        for name in ("logits", "scores", "probabilities"):
            model = graph({"input_ids": (INT64, _BATCHED)}, {name: list(shape)})
            with pytest.raises(Unsupported, match=f"its outputs are {name}; .*without its task's head"):
                interface.outputs(ir.from_proto(model), None, "given")
    both = graph({"input_ids": (INT64, _BATCHED)}, {"logits": ["batch", 2], "last_hidden_state": [*_BATCHED, 8]})
    assert interface.outputs(ir.from_proto(both), "mean", "given").hidden == "last_hidden_state"


torch = pytest.importorskip("torch", reason="needs the extra `export`")
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")


@pytest.mark.export
def test_the_bag_of_a_static_embedding_is_refused_by_export_and_check_and_its_directory_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tiny_modules

    from edgeq.frontend import locate
    from edgeq.frontend.torch.load import load_model

    folder = tiny_modules.static(tmp_path / "static")
    bag = load_bag(folder)
    file = tmp_path / "bag.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            bag, (torch.tensor([3, 4, 5, 6]), torch.tensor([0, 2])), str(file), dynamo=False, opset_version=17,
            input_names=["input_ids", "offsets"], output_names=["vectors"],
            dynamic_axes={"input_ids": {0: "n"}, "offsets": {0: "b"}},
        )  # fmt: skip
    tokenizer = next(folder.rglob("tokenizer.json"))
    given = ["--tokenizer", str(tokenizer), "--max-sequence", "64", "--out", str(tmp_path / "out")]
    for verb, options in (("export", given), ("check", [])):
        words = [verb, str(file), "--target", "x86-64-onnxruntime", *options, "--quiet"]
        assert cli.run(words) == Unsupported.exit_code
        assert "is an embedding bag" in capsys.readouterr().err
    assert load_model(locate.locate(str(folder))).get_embedding_dimension() == tiny_modules.DIM


def load_bag(folder: Path) -> torch.nn.Module:
    """Give the EmbeddingBag of a static embedding's directory."""
    from sentence_transformers import SentenceTransformer

    bag: torch.nn.Module = SentenceTransformer(str(folder), device="cpu")[0].embedding
    return bag
