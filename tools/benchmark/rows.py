"""List what is compared, one line each: edgeq's targets, and the peers with what makes and runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeq.backends.rockchip import TOOLKIT
from edgeq.system.environments import Environment

THREADS = 2
BUCKETS = (16, 32, 64, 128, 256)
TOOLS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """Describe one row of the tables."""

    name: str
    runtime: str  # a key of runner.RUNTIMES
    target: str = ""  # of an edgeq bundle
    mirrors: str = ""  # the row whose QDQ model this one runs
    maker: str = ""  # of a peer: a script in makers/, and what it is asked for
    form: str = ""
    follows: str = ""  # the peer whose file the maker starts from
    loads: str = ""  # what the runtime is given, below the folder that the maker filled
    files: tuple[str, ...] = ()  # what counts as its size
    environment: str = ""  # tools/constraints-NAME.txt; none: edgeq's own
    threads: int = THREADS
    every: int = 1  # quality is compared on every so-many-th text
    is_batched: bool = True  # False: static shapes with batch 1


def private(name: str) -> Environment:
    """Describe the environment of a peer by its pins; it is made once, and kept in edgeq's cache."""
    if name == TOOLKIT.name:
        return TOOLKIT
    return Environment(name, pins(TOOLS / f"constraints-{name}.txt"), ("3.11",))


def pins(path: Path) -> tuple[str, ...]:
    """Read a constraints file."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line)


def chosen(rows: Sequence[Row], wanted: Sequence[str] | None) -> list[Row]:
    """Give the rows asked for by a part of their name, and what those are made from; all, if none is asked for."""
    names = {row.name for row in rows if wanted is None or any(text in row.name for text in wanted)}
    names |= {row.follows for row in rows if row.name in names}
    return [row for row in rows if row.name in names]


FLOAT = "FP32, ONNX Runtime"
GEMM, SEVEN_BIT = "edgeq w8a8-gemm, ONNX Runtime", "edgeq w8a8-gemm-7bit, ONNX Runtime"
GEMM_OPENVINO = "edgeq w8a8-gemm, OpenVINO"
INT, INT_OLD = "edgeq w8a8-int, LiteRT", "edgeq w8a8-int, tflite-runtime 2.14"
INT_NPU, INT16 = "edgeq w8a8-int-npu, LiteRT", "edgeq w8a16-int, LiteRT"
ORT_DYNAMIC, ORT_STATIC = "ONNX Runtime dynamic int8", "ONNX Runtime quantize_static"
NNCF, OPENVINO_FLOAT = "NNCF transformer int8, OpenVINO", "float model, OpenVINO"
ST_ONNX, ST_OPENVINO = "sentence-transformers dynamic int8, ONNX", "sentence-transformers static int8, OpenVINO"
LITERT_FLOAT, AEQ = "litert-torch float .tflite", "ai-edge-quantizer w8a8"
HTP16, HTP16_V68 = "edgeq w8a16-htp, Snapdragon 8 Gen 3", "edgeq w8a16-htp, HTP v68"
HTP8 = "edgeq w8a8-htp, Snapdragon 8 Gen 3"
U55, U65, U85, U85_BIG = (f"edgeq w8a8-int-npu, Ethos-{name}" for name in ("U55-256", "U65-512", "U85-256", "U85-1024"))
RK3588 = "edgeq rockchip-int8, RK3588"
RK_PLAIN, RK_PLAIN_HYBRID = "FP32 export, Rockchip's int8, RK3588", "FP32 export, Rockchip's auto_hybrid, RK3588"
RK_EVEN, RK_EVEN_HYBRID = "equalised model, Rockchip's int8, RK3588", "equalised model, Rockchip's auto_hybrid, RK3588"

# The first is the whole export; each that follows adds to the same calibration, in this order.
OWN = (
    Row(GEMM, "edgeq", target="x86-64-onnxruntime"),
    Row(GEMM_OPENVINO, "edgeq", target="intel-openvino-cpu"),
    Row(INT, "edgeq", target="android-litert", threads=1, is_batched=False),
    Row(SEVEN_BIT, "edgeq", target="x86-64-avx2-onnxruntime"),
    Row(INT_OLD, "edgeq", target="raspberry-pi-tflite-runtime", threads=1, every=8, is_batched=False),
    Row(INT16, "edgeq", target="integer-only-w8a16", threads=1, every=4, is_batched=False),
    Row(INT_NPU, "edgeq", target="ethos-u85-256", threads=1, every=4, is_batched=False),
)
# One QDQ model in another runtime than its own: compared in quality and with its own runtime, never timed.
MIRRORS = (
    Row(f"{INT}'s QDQ model in ONNX Runtime", "onnxruntime-mirror", mirrors=INT, every=8),
    Row(f"{INT16}'s QDQ model in ONNX Runtime", "onnxruntime-mirror", mirrors=INT16, every=8),
)

# Compiled for NPUs: none of them runs on its device here, and none is timed.
NPU = (
    Row(HTP16, "edgeq", target="snapdragon-8-gen-3"),
    Row(HTP16_V68, "edgeq", target="qualcomm-v68"),
    Row(HTP8, "edgeq", target="snapdragon-8-gen-3-w8a8"),
    Row(U55, "edgeq", target="ethos-u55-256", threads=1),
    Row(U65, "edgeq", target="ethos-u65-512", threads=1),
    Row(U85, "edgeq", target="ethos-u85-256", threads=1),
    Row(U85_BIG, "edgeq", target="ethos-u85-1024", threads=1),
    Row(RK3588, "edgeq", target="rk3588"),
)


def _rockchip(name: str, form: str) -> Row:
    return Row(name, "rockchip", form=form, follows=RK3588, environment=TOOLKIT.name)


# What Rockchip's compiler makes of a float model and of the same calibration feeds, when nobody tells it more.
NPU_PEERS = (
    _rockchip(RK_PLAIN, "plain-int8"),
    _rockchip(RK_PLAIN_HYBRID, "plain-hybrid"),
    _rockchip(RK_EVEN, "equalised-int8"),
    _rockchip(RK_EVEN_HYBRID, "equalised-hybrid"),
)


def _onnxruntime(name: str, form: str) -> Row:
    return Row(name, "onnxruntime", maker="onnxruntime_tools", form=form, loads="model.onnx", files=("model.onnx",))


def _openvino(name: str, form: str) -> Row:
    files = ("model.xml", "model.bin")
    return Row(name, "openvino", maker="openvino_nncf", form=form, loads=files[0], files=files, environment="nncf")


def _exporter(name: str, form: str, files: tuple[str, ...]) -> Row:
    runtime = f"sentence-transformers-{form.partition('-')[0]}"
    environment = "sentence-transformers-exporters"
    return Row(name, runtime, maker="sentence_transformers_exporter", form=form, files=files, environment=environment)


def _litert(name: str, form: str, follows: str = "") -> Row:
    return Row(
        name, "litert", maker="litert", form=form, follows=follows, loads="model.tflite", files=("model.tflite",),
        environment="litert-torch", threads=1, every=4, is_batched=False,
    )  # fmt: skip


PEERS = (
    _onnxruntime(ORT_DYNAMIC, "dynamic"),
    _onnxruntime(ORT_STATIC, "static"),
    _openvino(OPENVINO_FLOAT, "float32"),
    _openvino(NNCF, "int8"),
    _exporter(ST_ONNX, "onnx-dynamic", ("onnx/model_qint8_avx512_vnni.onnx",)),
    _exporter(
        ST_OPENVINO,
        "openvino-static",
        ("openvino/openvino_model_qint8_quantized.xml", "openvino/openvino_model_qint8_quantized.bin"),
    ),
    _litert(LITERT_FLOAT, "float32"),
    _litert(AEQ, "w8a8", follows=LITERT_FLOAT),
)
