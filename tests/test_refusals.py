"""What cannot be exported is refused in words: the line, the reason, the way out, and never a traceback of torch."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend.torch import errors
from edgeq.graph import dialect, origins
from edgeq.graph.float_session import FloatSession
from edgeq.pipeline import check, stages, structure
from edgeq.quantization import schemes
from edgeq.records import FloatModel
from edgeq.system.files import file_ref
from edgeq.targets import load_target

TARGETS = ("x86-64-onnxruntime", "android-litert", "ethos-u85-256")

TRACE = """File "/home/someone/work/my_encoder.py", line 88, in forward
    x = torch.atan(x)
File "/usr/lib/python3/site-packages/torch/nn/functional.py", line 7, in atan
    return go()"""


def noted() -> onnx.ModelProto:
    import encoder

    model = encoder.encoder()
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.op_type = "Atan"
    node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=TRACE)
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'model', 'model.layer.0.mlp', 'atan']")
    model.graph.input[0].doc_string = "/home/someone"
    return model


def test_an_operator_outside_the_dialect_names_module_and_line_without_folders() -> None:
    model = noted()
    origins.keep(model)
    assert b"/home" not in model.SerializeToString()
    dialect.verify(model, "model")  # it stays float
    (island,) = dialect.islands(model)
    assert (island.operator, island.count) == ("Atan", 1)
    assert island.origin == "module layer.0.mlp, my_encoder.py line 88 `x = torch.atan(x)`"
    next(node for node in model.graph.node if node.op_type == "Atan").domain = "own"
    with pytest.raises(Unsupported) as found:
        dialect.verify(model, "model")
    assert "(module layer.0.mlp, my_encoder.py line 88 `x = torch.atan(x)`): op own::Atan; an op" in str(found.value)
    origins.strip(model)
    assert not any(node.metadata_props for node in model.graph.node)


@pytest.mark.parametrize(
    ("operator", "said"),
    [
        ("If", "control flow has graphs inside"),
        ("RandomNormalLike", "draws at random"),
        ("DynamicQuantizeLinear", "quantised already"),
        ("SequenceAt", "only tensors"),
        ("NoSuchOperator", "opset 21 has no such operator"),
    ],
)
def test_what_cannot_even_stay_float_is_refused_with_the_reason(operator: str, said: str) -> None:
    model = noted()
    node = next(node for node in model.graph.node if node.op_type == "Atan")
    node.op_type = operator
    if operator == "If":
        node.attribute.append(onnx.helper.make_attribute("then_branch", onnx.GraphProto()))
    assert dialect.islands(model) == ()
    with pytest.raises(Unsupported, match=f"op {operator}; .*{said}.*\n.*edgeq.graph.operators.DIALECT"):
        dialect.verify(model, "model")


def test_what_a_target_refuses_is_told_for_all_targets_before_anything_is_calibrated(tmp_path: Path) -> None:
    import encoder

    model = noted()
    origins.keep(model)
    dialect_model = encoder.encoder()
    path = tmp_path / "float.onnx"
    onnx.save(model, path)
    record = FloatModel(
        file=file_ref(path), source_sha256="0" * 64, inputs=("input_ids", "attention_mask"),
        outputs=("sentence_embedding",), dim=encoder.DIM, max_sequence=32, max_abs_error=0.0, passes=(),
        islands=dialect.islands(model),
    )  # fmt: skip
    asked = [(target, schemes.find(target.scheme, target.name)) for target in map(load_target, TARGETS)]
    with pytest.raises(Unsupported) as found:
        structure.require(model, record, asked)
    said = str(found.value)
    assert said.count("Atan (module layer.0.mlp, my_encoder.py line 88") == 2  # one for each scheme
    assert "android-litert: " in said and "ethos-u85-256: " in said and "x86-64-onnxruntime: " not in said
    assert "take Atan as float islands: " in said and "x86-64-onnxruntime" in said
    structure.require(model, record, [pair for pair in asked if pair[0].name == "x86-64-onnxruntime"])
    structure.require(dialect_model, record.model_copy(update={"islands": ()}), asked)  # made-up ranges refuse nothing


def grouped() -> onnx.ModelProto:
    """Give an encoder that normalises groups of the pooled vector: GroupNormalization of two axes."""
    import encoder

    model = encoder.encoder()
    pooled = next(node for node in model.graph.node if "pooled" in node.output)
    pooled.output[0] = "ungrouped"
    for name, number in (("group_gain", 1.0), ("group_bias", 0.0)):
        array = np.full(encoder.DIM, number, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    inputs = ["ungrouped", "group_gain", "group_bias"]
    node = onnx.helper.make_node("GroupNormalization", inputs, ["pooled"], "groups", num_groups=4)
    model.graph.node.insert(list(model.graph.node).index(pooled) + 1, node)
    return model


def test_an_island_that_the_runtime_lacks_is_refused_before_anything_is_calibrated(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    model = grouped()
    path = tmp_path / "float.onnx"
    onnx.save(model, path)
    assert FloatSession.of(model).names == ["sentence_embedding"]  # ONNX Runtime has it
    record = FloatModel(
        file=file_ref(path), source_sha256="0" * 64, inputs=("input_ids", "attention_mask"),
        outputs=("sentence_embedding",), dim=64, max_sequence=32, max_abs_error=0.0, passes=(),
        islands=dialect.islands(model),
    )  # fmt: skip
    names = ("x86-64-onnxruntime", "intel-openvino-cpu")
    asked = [(target, schemes.find(target.scheme, target.name)) for target in map(load_target, names)]
    with pytest.raises(Unsupported) as found:
        structure.require(model, record, asked)
    said = str(found.value)
    assert said.startswith("intel-openvino-cpu: cannot take this model:\n  - float islands: GroupNormalization. ")
    assert "Unsupported operation of type: GroupNormalization" in said and "Nothing was calibrated" in said
    assert "x86-64-onnxruntime" in said.split("as float islands: ")[1] and said.count("openvino") == 1
    structure.require(model, record, asked[:1])
    (ran, refused) = check.check_float_model(model, record.file, 32, [target for target, _ in asked])
    assert ran.problems == () and "GroupNormalization" in refused.problems[0]


def test_a_failure_of_torch_becomes_reason_line_and_way_out() -> None:
    try:
        try:
            raise RuntimeError("Could not guard on data-dependent expression Eq(u0, 1)\nmore of it")
        except RuntimeError as inner:
            raise ValueError("Failed to export the model. Step 1/3\nsee /tmp/report.md") from inner
    except ValueError as error:
        said = errors.explain(error)
    assert said.startswith(
        "RuntimeError: Could not guard on data-dependent expression Eq(u0, 1) (at test_refusals.py line "
    )
    assert "torch.where" in said and "\n" not in said and "/tmp" not in said


torch = pytest.importorskip("torch", reason="needs the extra `export`")

import tiny_source  # noqa: E402

import edgeq  # noqa: E402
from edgeq.system.cache import Cache  # noqa: E402


class Tokens(torch.nn.Module):
    """Look tokens up and treat each alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(600, 64)
        self.up, self.down = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)
        self.norm = torch.nn.LayerNorm(64)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.words(input_ids)
        return self.norm(x + self.down(self.act(self.up(x))))

    def act(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x)


class Island(Tokens):
    def act(self, x: torch.Tensor) -> torch.Tensor:
        return torch.atan(x)


class Branch(Tokens):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = super().forward(input_ids, attention_mask)
        if x.mean() > 100:
            return x * 2
        return x


class Bessel(Tokens):
    def act(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


@torch.library.custom_op("edgeq_tests::bent", mutates_args=())
def bent(x: torch.Tensor) -> torch.Tensor:
    return 2.0 * x


class Custom(Tokens):
    def act(self, x: torch.Tensor) -> torch.Tensor:
        return bent(x)


class Pixels(torch.nn.Module):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.mean((2, 3))


class Broken(Tokens):
    def act(self, x: torch.Tensor) -> torch.Tensor:
        return {}["no such key"]


class Shorter(Tokens):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids, attention_mask)[:, 1:]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sentence_transformers", reason="needs the extra `export`")
    return tiny_source.body(tmp_path_factory.mktemp("tokenizer") / "body")


def export(module: torch.nn.Module, tokenizer: Path, tmp_path: Path, **options: object) -> tuple[edgeq.Exported, ...]:
    options = {"targets": ["x86-64-avx2-onnxruntime"], "pooling": "mean", "normalize": True} | options
    return edgeq.export(
        module, out=tmp_path / "out", texts=tiny_source.texts(120), tokenizer=tokenizer, cache=Cache(tmp_path / "c"),
        keep_failed=True, **options,
    )  # fmt: skip


@pytest.mark.export
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Branch, r"data-dependent.*\(at test_refusals\.py line \d+ `if x\.mean\(\) > 100:`\).*torch\.where"),
        (Bessel, r"bessel_j0.*No backend has that operator"),
        (Custom, r"no fake impl registered.*bent.*test_refusals\.py line \d+.*No backend has that operator.*ONNX file"),
        (Broken, r"running it on the example inputs failed: KeyError: .*test_refusals\.py line \d+"),
        (Shorter, r"a vector for each token, padding included, is needed"),
    ],
)
def test_a_module_that_cannot_be_exported_says_why(
    kind: type[torch.nn.Module], said: str, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(Unsupported, match=said) as found:
        export(kind(), tokenizer, tmp_path)
    assert "Traceback" not in str(found.value) and "site-packages" not in str(found.value)


@pytest.mark.export
def test_a_float_island_is_taken_by_targets_that_keep_floats(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Island().train()
    (made,) = export(module, tokenizer, tmp_path)
    assert made.parity is not None and made.parity.cosine_mean > 0.999 and module.training
    manifest = (Path(made.path) / "manifest.json").read_text(encoding="utf-8")
    assert '"kind": "module"' in manifest and str(tmp_path) not in manifest and '"integer_matmuls": 2' in manifest
    assert '"operator": "Atan"' in manifest and [island.operator for island in made.islands] == ["Atan"]
    assert "`Atan` is outside edgeq's dialect and stays float" in (Path(made.path) / "README.md").read_text("utf-8")
    monkeypatch.setattr(stages, "calibrated", None)  # nothing is calibrated
    with pytest.raises(Unsupported, match=r"android-litert: (.|\n)*Atan \(test_refusals.py line \d+ .*nothing float"):
        export(module, tokenizer, tmp_path, targets=["x86-64-avx2-onnxruntime", "android-litert"])


@pytest.mark.export
def test_what_does_not_fit_a_module_is_said(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="texts need its tokenizer; give tokenizer="):
        edgeq.export(Tokens(), ["x86-64-avx2-onnxruntime"], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"a list is needed\. Write targets="):
        edgeq.export("model", "x86-64-avx2-onnxruntime", tmp_path / "out")
    with pytest.raises(ConfigError, match="a path, a name or a torch.nn.Module is needed"):
        edgeq.export(3, ["x86-64-avx2-onnxruntime"], tmp_path / "out")  # type: ignore[arg-type]
    for inputs, said in (
        ([torch.zeros(2, 4)], "input_ids is no tensor of whole numbers"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.int64)}, "at least 2 texts of 3 tokens"),
        ([torch.ones(2, 4, dtype=torch.int64)] * 3, "3 example inputs for forward"),
    ):
        with pytest.raises(ConfigError, match=said):
            export(Tokens(), tokenizer, tmp_path, example_inputs=inputs)


def with_tokenizer(tokenizer: Path, folder: Path, model: object) -> Path:
    """Save a model beside the tokenizer, as its author would."""
    shutil.copytree(tokenizer, folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


@pytest.mark.export
def test_a_reranker_is_refused_though_its_encoder_could_be_exported(tokenizer: Path, tmp_path: Path) -> None:
    import transformers
    from sentence_transformers import CrossEncoder

    from edgeq.frontend import locate

    config = transformers.BertConfig(
        vocab_size=600, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, num_labels=1
    )
    model = transformers.BertForSequenceClassification(config)
    plain = with_tokenizer(tokenizer, tmp_path / "plain", model)
    CrossEncoder(str(plain)).save_pretrained(str(tmp_path / "cross"))
    for folder, pooling in ((plain, "mean"), (plain, None), (tmp_path / "cross", None)):
        with pytest.raises(
            Unsupported, match=r"BertForSequenceClassification, whose head gives scores .* save it: Auto"
        ):
            locate.locate(str(folder), pooling)
    model.bert.save_pretrained(tmp_path / "plain")
    assert locate.locate(str(plain), "mean").pooling == "mean"  # the way out is one


@pytest.mark.export
def test_a_decoder_behind_an_encoder_is_refused_and_the_encoder_alone_exported(tokenizer: Path, tmp_path: Path) -> None:
    import transformers

    from edgeq.frontend import locate
    from edgeq.frontend.torch.load import load_model

    config = transformers.BartConfig(
        vocab_size=600, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=None,
    )  # fmt: skip
    whole = transformers.BartForConditionalGeneration(config)
    folder = with_tokenizer(tokenizer, tmp_path / "both", whole)
    with pytest.raises(Unsupported, match=r"both: BartModel has a decoder behind its encoder.*get_encoder\(\)"):
        load_model(locate.locate(str(folder), "mean"))
    encoder = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").get_encoder()
    (made,) = export(encoder, folder, tmp_path)
    assert made.parity is not None and made.parity.cosine_mean > 0.99


@pytest.mark.export
def test_a_model_that_mixes_padding_into_tokens_is_refused_before_it_is_traced(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    from edgeq.frontend import locate
    from edgeq.frontend.torch import convert

    config = transformers.ConvBertConfig(
        vocab_size=600, hidden_size=64, embedding_size=64, num_hidden_layers=1, num_attention_heads=4, head_ratio=2,
        intermediate_size=64, conv_kernel_size=3, initializer_range=0.2,
    )  # fmt: skip
    folder = with_tokenizer(tokenizer, tmp_path / "mixes", transformers.ConvBertModel(config))
    (tmp_path / "raw").mkdir()
    monkeypatch.setattr(convert, "trace", None)  # nothing is traced
    with pytest.raises(Unsupported, match=r"mixes: padding moves a text's vector.*which mixes padding into tokens"):
        convert.convert(locate.locate(str(folder), "mean"), tmp_path / "raw", hidden_state=False)


@pytest.mark.export
def test_images_of_any_size_and_files_of_images_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="needs the extra `images`")
    import tiny_vision
    import transformers

    from edgeq import cli
    from edgeq.frontend import locate
    from edgeq.frontend.torch.convert import convert

    folder = tiny_vision.dinov2(tmp_path / "any size")
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 36}, do_center_crop=False).save_pretrained(folder)
    (tmp_path / "raw").mkdir()
    with pytest.raises(Unsupported, match=r"any size/preprocessor_config\.json: size is .* different shapes") as found:
        convert(locate.locate(str(folder), "mean"), tmp_path / "raw", hidden_state=False)
    assert "Traceback" not in str(found.value) and "/tmp/tmp" not in str(found.value)
    given = tmp_path / "images.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Pixels(), (torch.zeros(2, 3, 32, 32),), str(given), dynamo=False, input_names=["pixel_values"],
            output_names=["vector"], dynamic_axes={"pixel_values": {0: "batch", 2: "height", 3: "width"}},
        )  # fmt: skip
    with pytest.raises(Unsupported, match="images.onnx: its input pixel_values, .* is of images"):
        export(given, tokenizer, tmp_path, pooling=None, normalize=None)  # type: ignore[arg-type]
    words = ["export", str(given), "--target", "x86-64-onnxruntime", "--images", str(tmp_path), "--out", str(tmp_path)]
    assert cli.run([*words, "--quiet"]) == ConfigError.exit_code
    with pytest.raises(ConfigError, match="takes images; modules come in for texts only"):
        export(Pixels(), tokenizer, tmp_path)


def test_an_old_file_is_refused_with_the_opset_to_export_again(tmp_path: Path) -> None:
    import encoder

    from edgeq.frontend.onnx import read

    model = encoder.encoder()
    model.opset_import[0].version = 8
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(Unsupported, match=r"old\.onnx: opset 8; 11 or newer .* every backend.*opset_version=17"):
        read.read(tmp_path / "old.onnx")
