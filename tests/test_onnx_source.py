"""ONNX files that someone else exported: whatever their opset, operators and interface, the float model is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

pytestmark = pytest.mark.export
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")

import given_onnx  # noqa: E402
import tiny_modules  # noqa: E402
import tiny_source  # noqa: E402
from sentence_transformers.sentence_transformer import modules  # noqa: E402

import edgeq  # noqa: E402
from edgeq.data.tokenizer import Tokenizer  # noqa: E402
from edgeq.data.tokens import Feeds, batches  # noqa: E402
from edgeq.errors import ConfigError, Unsupported  # noqa: E402
from edgeq.frontend import locate  # noqa: E402
from edgeq.frontend.float_model import CONFIG, MODEL, write_float_model  # noqa: E402
from edgeq.frontend.onnx import convert  # noqa: E402
from edgeq.frontend.onnx.find import OnnxOptions  # noqa: E402
from edgeq.frontend.onnx.fused_operators import expand_fused  # noqa: E402
from edgeq.graph import dialect  # noqa: E402
from edgeq.graph.float_session import FloatSession  # noqa: E402
from edgeq.records import FloatModel, Source  # noqa: E402
from edgeq.system.cache import Cache  # noqa: E402

OTHER_ENVIRONMENT = os.environ.get("EDGEQ_SENTENCE_TRANSFORMERS_PYTHON")
ENCODER = {"LayerNormalization": 5, "Gelu": 2, "Softmax": 2}


@pytest.fixture(scope="module")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_source.body(tmp_path_factory.mktemp("given") / "body")


@pytest.fixture(scope="module")
def given(body: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder at opset 14, which most tests start from."""
    return given_onnx.legacy(body, tmp_path_factory.mktemp("legacy") / "encoder.onnx", 14)


def exported(
    path: Path, tokenizer: Path | None, out: Path, pooling: str | None = "mean", **options: object
) -> tuple[Source, FloatModel]:
    out.mkdir()
    return write_float_model(locate.locate(str(path), pooling, OnnxOptions(tokenizer, **options)), out, True)


def counts(folder: Path) -> dict[str, int]:
    nodes = [node.op_type for node in onnx.load(folder / MODEL).graph.node]
    return {name: nodes.count(name) for name in set(nodes)}


def mean_of_given(path: Path, feeds: Feeds) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    named = {"input_ids": feeds.input_ids, "attention_mask": feeds.attention_mask}
    named["token_type_ids"] = np.zeros_like(feeds.input_ids)
    (hidden,) = session.run(None, named)
    mask = feeds.attention_mask[:, :, None]
    vectors = (hidden * mask).sum(1) / mask.sum(1)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def feeds_of(body: Path) -> Feeds:
    (batch,) = batches(Tokenizer.from_file(body / "tokenizer.json", 64).encode(tiny_source.texts(9, seed=4)))
    return batch.feeds


@pytest.mark.parametrize(
    ("opset", "attention"), [(11, "eager"), (13, "eager"), (14, "sdpa"), (17, "eager"), (20, "sdpa")]
)
def test_every_opset_and_attention_becomes_the_same_dialect(
    opset: int, attention: str, body: Path, tmp_path: Path
) -> None:
    path = given_onnx.legacy(body, tmp_path / "encoder.onnx", opset, attention)
    _, model = exported(path, body, tmp_path / "out", normalize=True)
    found = counts(tmp_path / "out")
    assert {name: found[name] for name in ENCODER} == ENCODER
    assert not set(found) & {"Erf", "Where", "Range", "Flatten", "IsNaN", "Expand", "Pow", "ReduceMean"}
    assert model.max_abs_error < 1e-5
    feeds = feeds_of(body)
    mine = FloatSession.of(tmp_path / "out" / MODEL)(feeds)
    assert np.abs(mine - mean_of_given(path, feeds)).max() < 1e-5
    weights = {item.name for item in onnx.load(tmp_path / "out" / MODEL).graph.initializer}
    assert any(name.endswith("layer.1.attention.self.query.weight") for name in weights)


@pytest.mark.parametrize("half", [False, True])
def test_fused_operators_are_taken_apart(half: bool, given: Path, body: Path, tmp_path: Path) -> None:
    path = given_onnx.fused(given, tmp_path / "fused.onnx", half)
    assert "com.microsoft::Attention" in given_onnx.operators(path)
    exported(path, body, tmp_path / "out", normalize=True)
    found = counts(tmp_path / "out")
    assert {name: found[name] for name in ENCODER} == ENCODER and "Expand" not in found
    feeds = feeds_of(body)
    moved = np.abs(FloatSession.of(tmp_path / "out" / MODEL)(feeds) - mean_of_given(given, feeds)).max()
    assert moved < (2e-3 if half else 1e-5)


def test_what_onnx_runtime_optimised_is_taken_apart(given: Path, body: Path, tmp_path: Path) -> None:
    path = given_onnx.optimised(given, tmp_path / "optimised.onnx")
    assert {"com.microsoft::FusedMatMul", "LayerNormalization"} <= given_onnx.operators(path)  # at opset 14
    exported(path, body, tmp_path / "out", normalize=True)
    feeds = feeds_of(body)
    assert np.abs(FloatSession.of(tmp_path / "out" / MODEL)(feeds) - mean_of_given(given, feeds)).max() < 1e-5


def test_other_names_int32_and_external_data(given: Path, body: Path, tmp_path: Path) -> None:
    model = onnx.load(given)
    names = {"input_ids": "tokens", "attention_mask": "input.mask", "token_type_ids": "segments"}
    for item in model.graph.input:
        item.type.tensor_type.elem_type = TensorProto.INT32
        model.graph.node.insert(0, helper.make_node("Cast", [names[item.name]], [item.name], to=TensorProto.INT64))
        item.name = names[item.name]
    order = list(reversed(model.graph.input))
    del model.graph.input[:]
    model.graph.input.extend(order)
    path = tmp_path / "renamed.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    record, _ = exported(path, body, tmp_path / "out", normalize=True)
    assert record.kind == "onnx" and record.modules == ("Onnx", "Pooling:mean", "Normalize")
    feeds = feeds_of(body)
    assert np.abs(FloatSession.of(tmp_path / "out" / MODEL)(feeds) - mean_of_given(given, feeds)).max() < 1e-5
    before = locate.locate(str(path), "mean", OnnxOptions(body)).sha256
    content = bytearray((tmp_path / "weights.bin").read_bytes())
    content[1000] ^= 1
    (tmp_path / "weights.bin").write_bytes(content)
    assert locate.locate(str(path), "mean", OnnxOptions(body)).sha256 != before
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ConfigError, match=r"its weights lie in weights\.bin, which is not beside it"):
        exported(path, body, tmp_path / "again")


@pytest.mark.parametrize("pooling", locate.POOLING_MODES)
def test_every_pooling_is_appended_as_numpy_has_it(pooling: str, given: Path, body: Path, tmp_path: Path) -> None:
    _, model = exported(given, body, tmp_path / "out", pooling)
    assert model.max_abs_error < 1e-5 and model.outputs == ("sentence_embedding", "last_hidden_state")
    graph = onnx.load(tmp_path / "out" / MODEL)
    dialect.verify(graph, "model")
    last = next(node for node in graph.graph.node if "sentence_embedding" in node.output)
    assert last.op_type != "Div" or last.name != "head/unit"  # normalising was not asked for


def test_a_directory_without_torch_weights_is_found_and_carries_its_modules(
    given: Path, body: Path, tmp_path: Path
) -> None:
    made = tiny_source.sentence_transformer(tmp_path / "whole", dense=True)
    folder = tmp_path / "found"
    (folder / "onnx").mkdir(parents=True)
    for path in sorted(made.rglob("*")):
        if path.is_file() and path.parent == made and path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
        elif path.is_file() and path.parent != made:
            (folder / path.parent.name).mkdir(exist_ok=True)
            (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    (folder / "onnx" / "model.onnx").write_bytes(given.read_bytes())
    out = tmp_path / "out"
    record, model = exported(folder, None, out, None)
    assert record.modules == ("Onnx", "Pooling:mean", "Dense", "Normalize")
    assert (record.name, record.dim, model.dim) == ("found", 32, 32)
    assert (out / CONFIG / "modules.json").is_file() and (out / CONFIG / "2_Dense" / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match=r"modules\.json says how to pool"):
        locate.locate(str(folder), "cls")


def test_a_folder_named_for_its_tokenizer_does_not_decide_the_pooling(given: Path, body: Path, tmp_path: Path) -> None:
    folder = tiny_source.sentence_transformer(tmp_path / "whole", dense=True)
    record, _ = exported(given, folder, tmp_path / "out", "cls", normalize=True)
    assert record.modules == ("Onnx", "Pooling:cls", "Normalize")
    kept = json.loads((tmp_path / "out" / CONFIG / "modules.json").read_text(encoding="utf-8"))
    assert [item["type"].rsplit(".")[-1] for item in kept] == ["Transformer", "Pooling", "Normalize"]
    assert exported(given, folder, tmp_path / "whose", None)[0].modules[1:] == ("Pooling:mean", "Dense", "Normalize")
    with pytest.raises(ConfigError, match="drop --normalize, or give --pooling with --tokenizer"):
        exported(given, folder, tmp_path / "both", None, normalize=True)
    vectors = encoder_file(tmp_path / "vectors.onnx")  # modules.json says nothing of a file that pools by itself
    assert exported(vectors, folder, tmp_path / "unit", None, normalize=True, max_sequence=48)[0].modules[1:] == (
        "Normalize",
    )


def test_a_limit_that_only_the_truncation_states_is_told(
    given: Path, body: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = json.loads((body / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["truncation"] = {"direction": "Right", "max_length": 24, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    file = locate.locate(str(given), "mean", OnnxOptions(tmp_path)).onnx
    assert file is not None and file.max_sequence == 24
    assert "texts are cut at 24 tokens, the truncation that stands there" in caplog.text
    caplog.clear()
    file = locate.locate(str(given), "mean", OnnxOptions(tmp_path, max_sequence=40)).onnx
    assert file is not None and file.max_sequence == 40
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 32}', encoding="utf-8")
    file = locate.locate(str(given), "mean", OnnxOptions(tmp_path)).onnx
    assert file is not None and file.max_sequence == 32 and caplog.text == ""


def encoder_file(path: Path, **changes: object) -> Path:
    """Write the handmade encoder, which gives `sentence_embedding` by itself."""
    import encoder

    model = encoder.encoder()
    if changes.get("static"):
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 16
    if changes.get("maskless"):
        mask = next(item for item in model.graph.input if item.name == "attention_mask")
        model.graph.input.remove(mask)
        shape = helper.make_node("Shape", ["input_ids"], ["mask_shape"])
        one = numpy_helper.from_array(np.array([1], np.int64))
        model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["mask_shape"], ["attention_mask"], value=one))
        model.graph.node.insert(0, shape)
    if changes.get("quantised"):
        model.graph.node.append(helper.make_node("DequantizeLinear", ["words", "one", "zero"], ["unused"]))
    onnx.save(model, path)
    return path


def test_a_file_that_gives_vectors_is_taken_as_it_is(body: Path, tmp_path: Path) -> None:
    path = encoder_file(tmp_path / "vectors.onnx")
    record, model = exported(path, body / "tokenizer.json", tmp_path / "out", None, max_sequence=48)
    assert record.modules == ("Onnx",) and model.outputs == ("sentence_embedding",)
    assert not (tmp_path / "out" / CONFIG / "modules.json").exists()
    with pytest.raises(ConfigError, match="is one vector a text already; drop --pooling mean"):
        exported(path, body, tmp_path / "again", "mean", max_sequence=48)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ("static", Unsupported, "both free, is needed"),
        ("maskless", Unsupported, "Export the model again with attention_mask as an input"),
        ("quantised", Unsupported, "quantised already"),
    ],
)
def test_what_cannot_be_taken_says_why(
    change: str, kind: type[Exception], message: str, body: Path, tmp_path: Path
) -> None:
    path = encoder_file(tmp_path / "bad.onnx", **{change: True})
    with pytest.raises(kind, match=message):
        exported(path, body, tmp_path / "out", None, max_sequence=48)


def test_what_is_missing_is_asked_for(given: Path, body: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json lies beside it"):
        locate.locate(str(given), "mean")
    with pytest.raises(ConfigError, match="give --pooling with one of cls"):
        exported(given, body, tmp_path / "out", None)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "tokenizer.json").write_bytes((body / "tokenizer.json").read_bytes())
    with pytest.raises(ConfigError, match="give --max-sequence"):
        locate.locate(str(given), "mean", OnnxOptions(alone))
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(ConfigError, match="not an ONNX file"):
        locate.locate(str(tmp_path / "text.onnx"), "mean", OnnxOptions(body))
    with pytest.raises(ConfigError, match="--tokenizer belong to an ONNX file"):
        locate.locate(str(body), "mean", OnnxOptions(body))
    with pytest.raises(ConfigError, match="cannot run it on 1x500 tokens"):
        exported(given, body, tmp_path / "long", max_sequence=500)


def test_fp16_that_moves_the_vectors_too_far_is_refused(
    given: Path, body: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = given_onnx.fused(given, tmp_path / "half.onnx", half=True)
    monkeypatch.setattr(convert, "NARROW_TOLERANCE", 1e-7)
    with pytest.raises(Unsupported, match="Its own arithmetic seems to overflow"):
        exported(path, body, tmp_path / "out")


def test_an_operator_that_cannot_be_taken_apart_is_named() -> None:
    import encoder

    model = encoder.encoder()
    for node in model.graph.node:
        if node.op_type == "Gelu":
            node.domain, node.op_type = "com.microsoft", "BiasSplitGelu"
    with pytest.raises(
        Unsupported, match=r"layer\.0\.gelu: BiasSplitGelu: .*\n.*\nExport the model again without"
    ) as found:
        expand_fused(ir.from_proto(model), "model")
    assert str(found.value).count("BiasSplitGelu") == 2


def test_no_torch_is_needed(given: Path, body: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['sentence_transformers'] = None\n"
        "from pathlib import Path; from edgeq.frontend import float_model, locate\n"
        "from edgeq.frontend.onnx.find import OnnxOptions\n"
        f"located = locate.locate({str(given)!r}, 'mean', OnnxOptions(Path({str(body)!r})))\n"
        f"print(float_model.write_float_model(located, Path({str(tmp_path)!r}))[1].max_abs_error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


def test_bfloat16_weights_become_float32_of_the_same_values(given: Path, body: Path, tmp_path: Path) -> None:
    import ml_dtypes

    model, rounded = onnx.load(given), onnx.load(given)
    for number, (item, other) in enumerate(zip(model.graph.initializer, rounded.graph.initializer, strict=True)):
        array = numpy_helper.to_array(item)
        if array.dtype != np.float32 or array.ndim != 2:
            continue
        halved, name = array.astype(ml_dtypes.bfloat16), item.name
        other.CopyFrom(numpy_helper.from_array(halved.astype(np.float32), name))
        item.CopyFrom(helper.make_tensor(f"{name}.half", TensorProto.BFLOAT16, array.shape, halved.tobytes(), raw=True))
        widened = helper.make_node("Cast", [f"{name}.half"], [name], name=f"widen_{number}", to=TensorProto.FLOAT)
        model.graph.node.insert(0, widened)
    onnx.save(model, tmp_path / "half.onnx")
    onnx.save(rounded, tmp_path / "rounded.onnx")
    exported(tmp_path / "half.onnx", body, tmp_path / "out", normalize=True)
    feeds = feeds_of(body)
    found = FloatSession.of(tmp_path / "out" / MODEL)(feeds)
    assert np.abs(found - mean_of_given(tmp_path / "rounded.onnx", feeds)).max() < 1e-5
    assert counts(tmp_path / "out")["MatMul"] == 17 and counts(tmp_path / "out")["Cast"] <= 2


PROGRAM = """
import json, sys
import numpy as np
from sentence_transformers import SentenceTransformer
texts = json.loads(sys.argv[1])
for path in sys.argv[2:]:
    found = SentenceTransformer(path, backend="onnx").encode(texts)
    print(float(np.abs(found - np.load(path + "-expected.npy")).max()))
"""


@pytest.mark.sentence_transformers
@pytest.mark.skipif(not OTHER_ENVIRONMENT, reason="EDGEQ_SENTENCE_TRANSFORMERS_PYTHON names no environment")
def test_sentence_transformers_opens_a_bundle_of_a_given_file(given: Path, body: Path, tmp_path: Path) -> None:
    texts = [*tiny_source.texts(9, seed=5), "The RED Tree", "a"]
    whole = tiny_modules.save(tmp_path / "whole", modules.Pooling(64), modules.Dense(64, 40), encoder=body)
    for options in ({"pooling": "mean", "normalize": True, "tokenizer": body}, {"tokenizer": whole}):
        (made,) = edgeq.export(
            given, targets=["x86-64-avx2-onnxruntime"], texts=tiny_source.texts(100), keep_failed=True,
            out=tmp_path / f"out{len(options)}", cache=Cache(tmp_path / "cache"), **options,
        )  # fmt: skip
        vectors = edgeq.load(made.path, allow_failed=True).encode(texts)
        assert np.ptp(vectors, axis=0).max() > 1e-3
        np.save(f"{made.path}-expected.npy", vectors)
    paths = [str(path.parent) for path in sorted(tmp_path.glob("out*/*/manifest.json"))]
    done = subprocess.run(
        [str(OTHER_ENVIRONMENT), "-c", PROGRAM, json.dumps(texts), *paths],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = [float(line) for line in done.stdout.split()[-2:]]
    assert len(paths) == 2 and max(errors) < 1e-5, errors
