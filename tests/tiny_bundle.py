"""A whole bundle around a tiny model: a table of word vectors, averaged under the mask, normalised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from edgeq.bundle.golden import GoldenData
from edgeq.bundle.write import Lineage, write
from edgeq.graph.float_session import FloatSession
from edgeq.records import (
    Artifact,
    Calibration,
    FileRef,
    FloatModel,
    Gate,
    Manifest,
    Measures,
    ParityReport,
    Placement,
    QdqModel,
    RunsOn,
    Scheme,
    Smoothing,
    Source,
    Target,
    TextSet,
)
from edgeq.system.files import file_ref
from edgeq.system.host import describe, machine

DIM = 16
MAX_SEQUENCE = 12
WORDS = "how do i reset my password where is the invoice please send it again thanks a lot".split()
TEXTS = tuple(" ".join(WORDS[i % 16] for i in range(start, start + 1 + start % 9)) for start in range(32))
PAD_ID = 0

GATE = Gate(
    centred_cosine_mean_min=0.9985,
    centred_cosine_p01_min=0.995,
    centred_cosine_min_min=0.993,
    regret_mean_max=0.002,
    regret_p99_max=0.02,
    spearman_min=0.99,
    invariance_min=0.99999,
    norm_error_max=1e-3,
    norm_error_unnormalized_max=0.05,
    exactness_min=0.99,
    float_fallbacks_max=0,
    host_operators_max=0,
    export_run_kinds=("device", "host-kernels"),
    release_run_kinds=("device",),
)
PLACEMENT = Placement(integer_matmuls=3, float_by_scheme=(), float_fallbacks=(), operators={"Gather": 1})
MEASURES = Measures(
    texts=512,
    centred_cosine_mean=0.9991,
    centred_cosine_mean_low=0.999,
    centred_cosine_mean_high=0.9992,
    centred_cosine_p01=0.997,
    centred_cosine_min=0.9951,
    regret_mean=0.001,
    regret_mean_low=0.0009,
    regret_mean_high=0.0011,
    regret_p99=0.01,
    spearman=0.999,
    invariance_min=0.9999999,
    norm_error_max=1e-6,
    is_normalized=True,
    worst_text="how do i",
    max_abs_error=0.01,
    cosine_mean=0.9995,
    cosine_min=0.997,
    top10_overlap=0.98,
)
TEXT_SET = TextSet(origin="default", sha256="7" * 64, count=512, tokens=5120, truncated=2)


def make_model(path: Path, seed: int = 0) -> None:
    """Write an ONNX file: tokens in, `sentence_embedding` and `last_hidden_state` out."""
    table = np.random.default_rng(seed).standard_normal((len(WORDS) + 2, DIM)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["last_hidden_state", "column"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "one"], ["total"], keepdims=0),
        helper.make_node("ReduceL2", ["total", "one"], ["norm"], keepdims=1),
        helper.make_node("Div", ["total", "norm"], ["sentence_embedding"]),
    ]
    tokens = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
        for name in ("input_ids", "attention_mask")
    ]
    outputs = [
        helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", DIM]),
        helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", DIM]),
    ]
    constants = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.array([-1], np.int64), "last"),
        numpy_helper.from_array(np.array([1], np.int64), "one"),
    ]
    graph = helper.make_graph(nodes, "tiny", tokens, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def make_config(directory: Path) -> None:
    """Write a tokenizer and the module files that an exporter prepares."""
    words = {word: position for position, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # As in real models: a fixed padding and a limit that are not the model's.
    tokenizer.enable_padding(length=20, pad_id=PAD_ID)
    tokenizer.enable_truncation(4)
    (directory / "1_Pooling").mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    limits = {"model_max_length": 20, "max_length": 4, "truncation_side": "right"}
    (directory / "tokenizer_config.json").write_text(json.dumps(limits), encoding="utf-8")
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 20}', encoding="utf-8")
    (directory / "modules.json").write_text("[]\n", encoding="utf-8")
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}\n', encoding="utf-8")


class TinyBackend:
    """Stand in for a runtime: ONNX Runtime on the file as it is."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.loads: list[int] = []

    def tools(self) -> Mapping[str, str]:
        return {"tiny": "1"}

    def rejections(self, model: object, target: object) -> tuple[()]:
        return ()

    def lower(self, model: object, target: object, out_dir: Path) -> Artifact:
        raise NotImplementedError

    def load(self, artifact: Artifact, bundle: Path, target: Target, threads: int = 0) -> object:
        self.loads.append(threads)
        session = FloatSession(str(bundle / artifact.files[0].path))

        def embed(feeds):  # type: ignore[no-untyped-def]
            vectors = session(feeds)
            vectors[:, 0] *= self.scale
            return vectors

        return embed


def make_target(**changes: object) -> Target:
    target = Target(
        name="tiny-target",
        summary="A target for tests.",
        source="tests",
        backend="tiny",
        scheme="w8a8-gemm",
        buckets_tokens=(),
        runtime={},
        runs_on=RunsOn(machine=machine(), cpu_flags_all=(), cpu_flags_any=()),
        gate=GATE,
    )
    return target.model_copy(update=changes)


def make_report(target: Target, **changes: object) -> ParityReport:
    report = ParityReport(
        target=target.name,
        ran_on="device",
        machine=describe(),
        status="passed",
        measures=MEASURES,
        gate=target.gate,
        failures=(),
        texts=TEXT_SET,
    )
    return report.model_copy(update=changes)


def _ref(name: str, digit: str) -> FileRef:
    return FileRef(path=f"/somewhere/cache/{name}", sha256=digit * 64, size_bytes=1)


def make_lineage(artifact_dir: Path, target: Target, prompts: Mapping[str, str] | None = None) -> Lineage:
    inputs, outputs = ("input_ids", "attention_mask"), ("sentence_embedding", "last_hidden_state")
    source = Source(
        name="tiny",
        kind="sentence-transformers",
        sha256="1" * 64,
        modules=("Transformer", "Pooling:mean", "Normalize"),
        inputs=inputs,
        dim=DIM,
        max_sequence=MAX_SEQUENCE,
        prompts=dict(prompts or {}),
        default_prompt_name=None,
    )
    model = FloatModel(
        file=_ref("float.onnx", "2"),
        source_sha256=source.sha256,
        inputs=inputs,
        outputs=outputs,
        dim=DIM,
        max_sequence=MAX_SEQUENCE,
        max_abs_error=1e-7,
        passes=(),
    )
    equalized = model.model_copy(update={"file": _ref("equalized.onnx", "3")})
    calibration = Calibration(
        file=_ref("calibration.npz", "4"),
        float_model_sha256=equalized.file.sha256,
        texts=TEXT_SET,
        seed=0,
        smoothing=Smoothing(alphas={"norm": 0.8}, cosine_mean=0.999, candidates=3),
    )
    scheme = Scheme(
        name="w8a8-gemm",
        weight_bits=8,
        activation_bits=8,
        activations_signed=False,
        embedding_bits=8,
        range_method="minmax",
    )
    qdq = QdqModel(
        file=_ref("qdq.onnx", "5"),
        float_model_sha256=equalized.file.sha256,
        calibration_sha256=calibration.file.sha256,
        scheme=scheme,
        inputs=inputs,
        outputs=outputs,
        dim=DIM,
        max_sequence=MAX_SEQUENCE,
        integer_matmuls=("a", "b", "c"),
        float_matmuls=(),
    )
    artifact = Artifact(
        backend=target.backend,
        target=target.name,
        files=(file_ref(artifact_dir / "onnx" / "model.onnx", artifact_dir),),
        qdq_sha256=qdq.file.sha256,
        placement=PLACEMENT,
        tools={"tiny": "1"},
    )
    return Lineage(
        edgeq="0.1.0",
        command=("edgeq", "export", "tiny"),
        target=target,
        source=source,
        float_model=model,
        equalized_model=equalized,
        calibration=calibration,
        qdq_model=qdq,
        artifact=artifact,
        tools={"onnx": "1", "numpy": "2"},
    )


def make_golden(artifact_dir: Path, config_dir: Path) -> GoldenData:
    tokenizer = Tokenizer.from_file(str(config_dir / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_SEQUENCE)
    tokenizer.enable_padding(pad_id=PAD_ID)
    encoded = tokenizer.encode_batch(list(TEXTS))
    ids = np.array([item.ids for item in encoded], np.int64)
    mask = np.array([item.attention_mask for item in encoded], np.int64)
    session = FloatSession(str(artifact_dir / "onnx" / "model.onnx"))
    from edgeq.data.tokens import Feeds

    vectors = session(Feeds(input_ids=ids, attention_mask=mask))
    noise = np.random.default_rng(1).standard_normal(vectors.shape).astype(np.float32) * np.float32(0.005)
    return GoldenData(TEXTS, ids, mask, vectors + noise, vectors, PAD_ID)


def make_bundle(
    out: Path,
    *,
    name: str = "tiny-target",
    target: Target | None = None,
    report: ParityReport | None = None,
    prompts: Mapping[str, str] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    codecs: bytes | None = None,
) -> tuple[Path, Manifest]:
    """Write a bundle below `out` from inputs in a folder beside it."""
    inputs = out.parent / f"{out.name}-inputs-{seed}"
    artifact_dir, config_dir = inputs / "artifact", inputs / "config"
    if not inputs.exists():
        make_model(artifact_dir / "onnx" / "model.onnx", seed)
        make_config(config_dir)
    target = target or make_target()
    manifest = write(
        out / name,
        make_lineage(artifact_dir, target, prompts),
        artifact_dir,
        config_dir,
        make_golden(artifact_dir, config_dir),
        report or make_report(target),
        overwrite,
        codecs=codecs,
    )
    return out / name, manifest
