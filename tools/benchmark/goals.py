"""Hold the numbers to reach, and judge what was measured against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmark.figures import Blank, Figures, at
from benchmark.making import MINILM
from benchmark.merging import QUALITY
from benchmark.rows import (
    GEMM,
    GEMM_OPENVINO,
    HTP8,
    HTP16,
    HTP16_V68,
    INT,
    INT16,
    INT_NPU,
    INT_OLD,
    LITERT_FLOAT,
    OPENVINO_FLOAT,
    RK3588,
    SEVEN_BIT,
    U55,
    U85,
)  # fmt: skip

NOT_MEASURED = "not measured"
_U55, _U85 = (("npu", "estimates", row) for row in (U55, U85))


@dataclass(frozen=True)
class Goal:
    """Name a figure by its path in the results, and the limit it is held to."""

    what: str
    path: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def limit(self) -> str:
        """Give the limit as shown."""
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def judge(self, results: Figures) -> tuple[float, bool] | Blank:
        """Give the figure and whether it meets the limit (NaN meets none); a blank stays one."""
        found = at(results, *self.path)
        if isinstance(found, Blank):
            return found
        value = float(found["median"] if isinstance(found, Mapping) else found)  # a ratio has an interval, too
        is_met = (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)
        return value, is_met


def _compiled(name: str, row: str, size_mb: float) -> tuple[Goal, ...]:
    """Give the goals of what HTP's compiler makes for 128 tokens."""
    path = ("npu", "compiling", row, "128")
    return (
        Goal(f"{name}: partitions", (*path, "partitions"), at_most=1.0),
        Goal(f"{name}: nodes on the CPU", (*path, "cpu_nodes"), at_most=0.0),
        Goal(f"{name}: context binary, MB", (*path, "size_mb"), at_most=size_mb),
        Goal(f"{name}: compiling, s", (*path, "seconds"), at_most=30.0),
    )


MPNET = "all-mpnet-base-v2"


def _near(name: str, row: str, mean: float, least: float, regret: float, model: str = MINILM) -> tuple[Goal, ...]:
    """Give the goals of a row's vectors against FP32's: centred cosine, mean and smallest, and regret@10."""
    path = (QUALITY, model, "rows", row)
    shown = name if model == MINILM else f"{model}, {name}"
    return (
        Goal(f"{shown}: centred cosine mean", (*path, "centred_cosine_mean"), at_least=mean),
        Goal(f"{shown}: centred cosine min", (*path, "centred_cosine_min"), at_least=least),
        Goal(f"{shown}: regret@10", (*path, "regret_mean"), at_most=regret),
    )


_ROWS, _MPNET_ROWS = (QUALITY, MINILM, "rows"), (QUALITY, MPNET, "rows")
GOALS = (
    # Peers are compared on the model that edgeq has: an export that went wrong must not pass for a poor quantiser.
    Goal("float .tflite is the same model: centred cosine min", (*_ROWS, LITERT_FLOAT, "centred_cosine_min"), 0.9999),
    Goal("float model in OpenVINO is the same: centred min", (*_ROWS, OPENVINO_FLOAT, "centred_cosine_min"), 0.999),
    *_near("w8a8-gemm, ONNX Runtime", GEMM, 0.9995, 0.993, 0.0003),
    Goal("w8a8-gemm, ONNX Runtime: STS Spearman, % of FP32", (*_ROWS, GEMM, "sts_percent"), at_least=99.8),
    Goal("w8a8-gemm, ONNX Runtime: nDCG@10, % of FP32", (*_ROWS, GEMM, "ndcg_percent"), at_least=99.7),
    Goal("w8a8-gemm, ONNX Runtime: invariance", (*_ROWS, GEMM, "invariance"), at_least=0.99999),
    Goal("w8a8-gemm, ONNX Runtime: size, MB", (*_ROWS, GEMM, "size_mb"), at_most=24.0),
    *_near("w8a8-gemm-7bit", SEVEN_BIT, 0.9968, 0.975, 0.001),
    *_near("w8a8-gemm, OpenVINO", GEMM_OPENVINO, 0.9995, 0.993, 0.0003),
    Goal("w8a8-gemm, OpenVINO: invariance", (*_ROWS, GEMM_OPENVINO, "invariance"), at_least=0.9999),
    *_near("w8a8-int", INT, 0.9988, 0.99, 0.001),
    Goal("w8a8-int: STS Spearman, % of FP32", (*_ROWS, INT, "sts_percent"), at_least=99.7),
    Goal("w8a8-int: nDCG@10, % of FP32", (*_ROWS, INT, "ndcg_percent"), at_least=99.7),
    Goal("w8a8-int: between buckets", (*_ROWS, INT, "invariance"), at_least=0.9999),
    Goal("w8a8-int: size, MB", (*_ROWS, INT, "size_mb"), at_most=24.0),
    Goal("w8a8-int, tflite-runtime form: size, MB", (*_ROWS, INT_OLD, "size_mb"), at_most=25.0),
    *_near("w8a16-int", INT16, 0.999, 0.995, 0.0003),
    Goal("w8a16-int: between buckets", (*_ROWS, INT16, "invariance"), at_least=0.9999),
    *_near("w8a8-int-npu", INT_NPU, 0.997, 0.965, 0.001),
    Goal("runtimes sharing w8a8-gemm: centred mean", (QUALITY, MINILM, "shared", "w8a8-gemm"), at_least=0.999),
    Goal("runtimes sharing w8a16-int: centred mean", (QUALITY, MINILM, "shared", "w8a16-int"), at_least=0.999),
    Goal("runtimes sharing w8a8-int: centred mean", (QUALITY, MINILM, "shared", "w8a8-int"), at_least=0.997),
    Goal("pairs of schemes: centred mean less product of those to FP32", (QUALITY, MINILM, "across"), at_least=-0.001),
    *_near("w8a8-gemm, ONNX Runtime", GEMM, 0.9991, 0.98, 0.0005, MPNET),
    *_near("w8a8-gemm, OpenVINO", GEMM_OPENVINO, 0.9991, 0.98, 0.0005, MPNET),
    *_near("w8a8-int", INT, 0.9975, 0.965, 0.002, MPNET),
    *_near("w8a16-int", INT16, 0.9994, 0.98, 0.0005, MPNET),
    Goal(f"{MPNET}, w8a8-gemm, ONNX Runtime: invariance", (*_MPNET_ROWS, GEMM, "invariance"), at_least=0.99999),
    Goal(f"{MPNET}, w8a8-gemm, OpenVINO: invariance", (*_MPNET_ROWS, GEMM_OPENVINO, "invariance"), at_least=0.9999),
    Goal(f"{MPNET}, w8a8-int: between buckets", (*_MPNET_ROWS, INT, "invariance"), at_least=0.9999),
    Goal(f"{MPNET}, w8a16-int: between buckets", (*_MPNET_ROWS, INT16, "invariance"), at_least=0.9999),
    Goal("latency at 128, ONNX Runtime int8 of FP32", ("latency", "ratios", "128", "ort_of_float32"), at_most=0.45),
    Goal("latency at 128, ONNX Runtime int8 of dynamic", ("latency", "ratios", "128", "ort_of_dynamic"), at_most=1.0),
    Goal("throughput, ONNX Runtime int8 over FP32", ("throughput", "ratios", "ort_of_float32"), at_least=2.5),
    Goal("latency at 16, OpenVINO int8 of NNCF's", ("latency", "ratios", "16", "openvino_of_nncf"), at_most=1.0),
    Goal("latency at 32, OpenVINO int8 of NNCF's", ("latency", "ratios", "32", "openvino_of_nncf"), at_most=1.0),
    Goal("latency at 128, OpenVINO int8 of NNCF's", ("latency", "ratios", "128", "openvino_of_nncf"), at_most=0.85),
    Goal("latency at 128, OpenVINO int8 of float", ("latency", "ratios", "128", "openvino_of_float"), at_most=0.75),
    Goal("latency at 128, int8 .tflite of float .tflite", ("latency", "ratios", "128", "tflite_of_float"), at_most=0.6),
    Goal(".tflite: resident above the bare runtime, MB", ("tflite", "resident_above_bare_mb"), at_most=90.0),
    Goal(".tflite: lowering, s", ("tflite", "lowering_s"), at_most=10.0),
    Goal(".tflite: lowering, peak GB", ("tflite", "lowering_peak_gb"), at_most=1.5),
    Goal("second bundle of one export (OpenVINO) adds, s", ("making", GEMM_OPENVINO, "seconds"), at_most=10.0),
    Goal("third bundle of one export (LiteRT) adds, s", ("making", INT, "seconds"), at_most=10.0),
    Goal("export of 512 texts, s", ("export", "first_s"), at_most=45.0),
    Goal("export of 512 texts, peak GB", ("export", "first_peak_gb"), at_most=1.5),
    Goal("second target of the same scheme, s", ("export", "second_s"), at_most=10.0),
    Goal("device script: golden texts", ("device", "texts"), at_least=64),
    Goal("device script: seconds", ("device", "seconds"), at_most=10),
    Goal("device script: peak memory, MB", ("device", "peak_mb"), at_most=300),
    Goal("codes: int8 on both sides, recall@10", ("codes", "rows", "FP32: int8, both sides", "recall_at_10"), 0.992),
    Goal("codes: int8, nDCG@10 over FP32's", ("codes", "rows", "FP32: int8", "ndcg_at_10"), at_least=0.999),
    Goal("codes: one bit, ordered by int8, recall@10", ("codes", "rows", "FP32: binary", "recall_at_10"), 0.98),
    Goal("codes: rabitq, ordered by int8, recall@10", ("codes", "rows", "FP32: rabitq", "recall_at_10"), 0.975),
    Goal("codes: recall@10 lost by int8 of w8a8-gemm", ("codes", "lost_by_int8_of_the_integer_model"), at_most=0.002),
    Goal("codes: encoding with a codec over without", ("codes", "encoding_most"), at_most=1.03),
    Goal("a million bits and int8 over FAISS's RaBitQfs, time", ("million", "edgeq over RaBitQfs"), at_most=1.0),
    Goal("a million int8 codes in HNSW, peak GB", ("million", "HNSW of int8: peak GB"), at_most=2.0),
    Goal("calibration memory, 2,048 texts over 128", ("calibration", "ratio"), at_most=1.05),
    Goal("w8a16-htp, HTP v75: centred cosine mean", ("npu", "quality", HTP16, "centred_cosine_mean"), at_least=0.9992),
    Goal("w8a16-htp, HTP v75: centred cosine min", ("npu", "quality", HTP16, "centred_cosine_min"), at_least=0.998),
    *_compiled("w8a16-htp, HTP v75", HTP16, 36.0),
    Goal(
        "w8a16-htp, HTP v68: centred cosine mean", ("npu", "quality", HTP16_V68, "centred_cosine_mean"), at_least=0.997
    ),
    *_compiled("w8a16-htp, HTP v68", HTP16_V68, 36.0),
    Goal("w8a8-htp, HTP v75: centred cosine mean", ("npu", "quality", HTP8, "centred_cosine_mean"), at_least=0.9975),
    *_compiled("w8a8-htp, HTP v75", HTP8, 24.0),
    Goal(
        "Ethos-U85-256: centred cosine mean of the integer file",
        ("npu", "quality", U85, "centred_cosine_mean"),
        at_least=0.997,
    ),
    Goal("Ethos-U85-256 [1,128]: operators on the host", (*_U85, "128", "host_operators"), at_most=0.0),
    Goal("Ethos-U85-256 [1,128]: Vela's estimate, ms", (*_U85, "128", "estimated_ms"), at_most=19.0),
    Goal("Ethos-U85-256 [1,32]: Vela's estimate, ms", (*_U85, "32", "estimated_ms"), at_most=4.5),
    Goal(
        "Ethos-U55-256: centred cosine mean of the integer file",
        ("npu", "quality", U55, "centred_cosine_mean"),
        at_least=0.997,
    ),
    Goal("Ethos-U55-256 [1,128]: operators on the host", (*_U55, "128", "host_operators"), at_most=4.0),
    Goal("Ethos-U55-256 [1,128]: Vela's estimate, ms", (*_U55, "128", "estimated_ms"), at_most=160.0),
    Goal(
        "rockchip-int8, RK3588: centred cosine mean", ("npu", "quality", RK3588, "centred_cosine_mean"), at_least=0.985
    ),
)


def judged(results: Figures) -> list[tuple[str, str, str, str]]:
    """Give a row for each goal: what, the figure, its limit, and whether it is met.

    Goals other than quality's are all-MiniLM-L6-v2's: what was measured of another model meets and misses none.
    """
    of = results if results.get("model", MINILM) == MINILM else {QUALITY: results.get(QUALITY, {})}
    rows = []
    for goal in GOALS:
        found = goal.judge(of)
        if isinstance(found, Blank):
            reason = "" if found.reason == NOT_MEASURED else f": {found.reason}"
            rows.append((goal.what, "", goal.limit, f"{NOT_MEASURED}{reason}"))
        else:
            rows.append((goal.what, f"{found[0]:.5g}", goal.limit, "met" if found[1] else "MISSED"))
    return rows
