"""Write the results as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.clock import BATCH, BATCH_SEQUENCE, RATIOS
from benchmark.figures import Blank, Figures, plain, restored
from benchmark.goals import judged
from benchmark.making import MINILM
from benchmark.merging import PARTS, QUALITY
from edgeq.system.files import write_bytes

JSON = "bench.json"
_VECTORS = {
    "centred_cosine_mean": "centred cosine, mean", "centred_cosine_min": "min", "regret_mean": "regret@10",
}  # fmt: skip
_QUALITY = {
    "texts": "texts", **_VECTORS, "sts_percent": "STS %", "ndcg_percent": "nDCG %", "invariance": "invariance",
    "cosine_mean": "plain cosine, mean", "promoted": "promoted", "size_mb": "MB",
}  # fmt: skip
_NPU = {
    "ran_on": "ran on", "texts": "texts", **_VECTORS, "invariance": "invariance", "cosine_mean": "plain cosine, mean",
    "cosine_min": "min", "size_mb": "MB",
}  # fmt: skip
_EARLIER = Blank("measured by a version that did not give it")
_COMPILING = {"seconds": "seconds", "size_mb": "MB", "partitions": "partitions", "cpu_nodes": "nodes on the CPU"}
_ESTIMATES = {
    "estimated_ms": "estimate, ms", "clock_mhz": "MHz", "system_config": "system configuration",
    "memory_mode": "memory mode", "cycles": "cycles", "sram_kib": "SRAM, KiB",
    "dram_or_flash_kib": "DRAM or flash, KiB", "host_operators": "on the host", "on_host": "which",
}  # fmt: skip
_CODES = {
    "recall_at_1": "recall@1", "recall_at_10": "@10", "recall_at_100": "@100", "ndcg_at_10": "nDCG@10 over FP32's",
    "regret_at_10": "regret@10", "lost_by_model": "lost by model", "lost_by_code": "by code",
    "queries_per_second": "queries/s",
}  # fmt: skip
_MAKING = ("seconds", "peak_gb", "size_mb")
_RATIO = (
    "the median of the ratios of neighbouring rounds, in the interval that holds it in 99 % of cases, and what that "
    "tells of the first:"
)


class Notes:
    """Number the reasons of blank cells, each reason once."""

    def __init__(self) -> None:
        """Start without any."""
        self._reasons: dict[str, int] = {}

    def cell(self, figure: Any, digits: int = 5) -> str:
        """Show a figure; a blank shows the number of its reason and nothing else."""
        if figure is None:
            return ""
        if isinstance(figure, Blank):
            return f"({self._reasons.setdefault(figure.reason, len(self._reasons) + 1)})"
        return f"{figure:.{digits}g}" if isinstance(figure, float) else str(figure)

    def lines(self) -> list[str]:
        """List the reasons."""
        return [f"({number}) {reason}" for reason, number in self._reasons.items()]


def write(results: Figures, folder: Path) -> None:
    """Write bench.md and bench.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "bench.md", markdown(results).encode())
    write_bytes(folder / JSON, (json.dumps(plain(results), indent=2) + "\n").encode())


def read(folder: Path) -> Figures:
    """Read what an earlier run wrote."""
    found: Figures = restored(json.loads((folder / JSON).read_text(encoding="utf-8")))
    return found


def markdown(results: Figures) -> str:
    """Write every part that was measured as a table."""
    notes = Notes()
    parts = [_heading(results), "## Goals", table(("goal", "measured", "limit", "result"), judged(results))]
    for title, name, write_part in (
        ("Making", "making", _making),
        ("Quality", QUALITY, _quality),
        ("Speed", "latency", _latency),
        ("Throughput", "throughput", _throughput),
        ("NPUs", "npu", _npu),
        ("Codes", "codes", _codes),
    ):
        if name in results:
            parts += [f"## {title}", *_run(results, name), *write_part(results[name], results, notes)]
    for title, name in (
        ("w8a8-int in LiteRT", "tflite"),
        ("Export", "export"),
        ("Device script", "device"),
        ("Calibration", "calibration"),
        ("A million vectors", "million"),
    ):
        if name in results:
            rows = [(key, notes.cell(value, 3)) for key, value in results[name].items()]
            parts += [f"## {title}", *_run(results, name), table(("figure", "value"), rows)]
    if notes.lines():
        parts += ["## Blank cells", "\n".join(f"{line}  " for line in notes.lines())]
    return "\n\n".join(parts) + "\n"


def _heading(results: Figures) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        "# edgeq beside its peers\n\n"
        f"Written by `tools/bench` on {results['date']}: {results.get('model', MINILM)}, "
        f"one run on {results['machine']}.\n\n{versions}.\n\n"
        "A table that names another date comes from a run of its own. A cell in brackets is blank, for the reason of "
        "that number below."
    )


def _run(results: Figures, name: str) -> list[str]:
    """Say where a part comes from, if not from the run in the heading."""
    run = results.get(PARTS, {}).get(name)
    return [] if run is None else [f"Measured apart from the rest on {run['date']}, on {run['machine']}."]


def _making(figures: Figures, results: Figures, notes: Notes) -> list[str]:
    text = (
        "Seconds and peak memory of the whole process tree. The first of edgeq's rows is the whole export, calibration "
        "and parity included; each that follows is what one more bundle adds, parity included. Peers start from "
        "edgeq's FP32 ONNX file, those of sentence-transformers and litert-torch from the torch model; static ones "
        "calibrate on the same 128 texts of the default calibration set. Size: what the runtime loads."
    )
    shown = {row: [notes.cell(found[key], 3) for key in _MAKING] for row, found in figures.items()}
    rows = [(row, figures[row].get("ran_on", ""), *cells) for row, cells in shown.items()]
    return [text, table(("model", "ran on", "seconds", "peak GB", "MB"), rows)]


def _quality(figures: Figures, results: Figures, notes: Notes) -> list[str]:
    text = (
        "Against FP32 in ONNX Runtime. Centred cosine: of vectors of length 1 less the mean of FP32's. Regret@10: the "
        "FP32 similarity that is lost by taking the model's ten nearest texts instead of FP32's; it depends on the "
        "set of texts, so compare it within a table. STS: Spearman; retrieval: nDCG@10; both in % of FP32's on the "
        "same texts. Where there are fewer texts the runtime is too slow for all: every so-many-th pair, question and "
        "paragraph, and the paragraphs that belong to those questions. Invariance: the smallest cosine of one text at "
        "other paddings. Promoted: how many weight products the export raised to 16-bit activations by itself. Plain "
        "cosine judges nothing. MB: what the runtime loads."
    )
    parts = [text]
    for model, found in figures.items():
        run, every = found["run"], found["every"]
        where = f"{run['date']}, {run['machine']}; {'all texts' if every == 1 else f'every {every}th text'}."
        rows = [(row, *_cells(figures, _QUALITY, notes)) for row, figures in found["rows"].items()]
        parts += [f"### {model}", where, table(("model", *_QUALITY.values()), rows)]
        if found["pairs"]:
            parts += ["Between edgeq's runtimes:", _pairs(found["pairs"], notes)]
    return parts


def _cells(figures: Figures, columns: Mapping[str, str], notes: Notes) -> list[str]:
    """Show a row's figures; where it has no vectors, the reason, and where its run gave no such figure, that."""
    texts = figures["texts"]
    absent = texts if isinstance(texts, Blank) else _EARLIER
    return [notes.cell(figures.get(key, absent)) for key in columns]


def _pairs(pairs: Sequence[Figures], notes: Notes) -> str:
    rows = [
        (pair["first"], pair["second"], str(pair["texts"]), "same" if pair["is_shared"] else "",
         notes.cell(pair["centred_cosine_mean"]), "" if pair["is_shared"] else notes.cell(pair["product"]))
        for pair in pairs
    ]  # fmt: skip
    return table(("first", "second", "texts", "scheme", "centred cosine, mean", "product of those to FP32"), rows)


def _latency(figures: Figures, results: Figures, notes: Notes) -> list[str]:
    lengths = list(figures["models"])
    threads: Mapping[str, int] = results["threads"]
    rows = [
        (row, str(threads[row]), *(notes.cell(figures["models"][at][row], 3) for at in lengths))
        for row in figures["models"][lengths[0]]
    ]
    text = (
        "Median milliseconds at batch 1, each model in a process of its own, all taking turns; TFLite on one thread. "
        "Peers of OpenVINO compute float parts in the precision that it chooses (bf16 where the CPU has it). A model "
        "whose target is another kind of CPU ran on this one's kernels."
    )
    columns = ("model", "threads", *(f"{at} tokens, ms" for at in lengths))
    keys = list(figures["ratios"][lengths[0]])
    shown = [(" / ".join(RATIOS[key]), *(_ratio(figures["ratios"][at][key], notes) for at in lengths)) for key in keys]
    explained = f"Latency of the first over that of the second: {_RATIO}"
    return [text, table(columns, rows), explained, table(("pair", *lengths), shown)]


def _throughput(figures: Figures, results: Figures, notes: Notes) -> list[str]:
    rows = [(row, notes.cell(value, 3)) for row, value in figures["models"].items()]
    text = f"Batches of {BATCH} texts of {BATCH_SEQUENCE} tokens each, without padding, 2 threads."
    shown = [(" / ".join(RATIOS[key]), _ratio(value, notes)) for key, value in figures["ratios"].items()]
    explained = f"Throughput of the first over that of the second: {_RATIO}"
    return [text, table(("model", "texts a second"), rows), explained, table(("pair", "ratio"), shown)]


def _ratio(figure: Figures | Blank, notes: Notes) -> str:
    """Show a ratio with its interval and what it tells; one that was measured before there were intervals, alone."""
    if not isinstance(figure, Mapping):
        return notes.cell(figure, 3)
    ends = "" if figure["low"] is None else f" [{figure['low']:.3g}, {figure['high']:.3g}]"
    return f"{figure['median']:.3g}{ends} {figure['verdict']}"


def _npu(figures: Figures, results: Figures, notes: Notes) -> list[str]:
    tools = ", ".join(f"{name} {version}" for name, version in figures["tools"].items())
    text = (
        f"Compiled by {tools}. None of these devices was at hand, and an emulator's time is no latency. HTP: the "
        "shipped context binaries in QAIRT's emulator; Rockchip: its simulator, which does not round as the NPU does; "
        "Ethos-U: the integer file that Vela compiled, on this CPU's kernels. All rows on the same texts, each in the "
        "smallest length of 32 and 128 that it fits. MB: the file for 128 tokens."
    )
    vectors = [(row, *_cells(found, _NPU, notes)) for row, found in figures["quality"].items()]
    return [
        text,
        table(("model", *_NPU.values()), vectors),
        "HTP's compiler, by the clock of the whole process:",
        _lengths(figures["compiling"], _COMPILING, notes),
        "What Vela *estimates* of the NPU alone, with the clock and memories that it assumes; nothing was measured:",
        _lengths(figures["estimates"], _ESTIMATES, notes),
    ]


def _codes(figures: Figures, results: Figures, notes: Notes) -> list[str]:
    text = (
        "Recall of FP32's exact search; candidates, thirty for each result, are ordered by centred int8 codes where a "
        "code is coarser. Lost, of recall@10: by the model's floats, by the code, by the index. Bytes: of a code, "
        "and of the finer one."
    )
    found = figures["rows"]
    if isinstance(found, Blank):
        return [text, found.reason]
    first = next(iter(found.values()))
    counted = f"{first['queries']:,} questions, {first['documents']:,} documents."
    rows = [
        (each["model"], each["codec"], _bytes(each), *(notes.cell(each.get(key), 4) for key in _CODES))
        for each in found.values()
    ]
    encoding = [(name, notes.cell(ratio, 4)) for name, ratio in figures["encoding"].items()]
    return [
        text, counted, table(("model", "codec", "bytes", *_CODES.values()), rows),
        "Time of `encode_document` with a codec over that without, one thread:", table(("codec", "ratio"), encoding),
    ]  # fmt: skip


def _bytes(each: Figures) -> str:
    """Show the bytes of a code and of the finer one."""
    if "code_bytes" not in each:
        return ""
    return f"{each['code_bytes']}" + (f" + {each['rescoring_bytes']}" if each["rescoring_bytes"] else "")


def _lengths(figures: Figures, columns: Mapping[str, str], notes: Notes) -> str:
    """Write what was found for each model and length."""
    rows = [
        (row, length, *(notes.cell(found[key], 4) for key in columns))
        for row, lengths in figures.items()
        for length, found in lengths.items()
    ]
    return table(("model", "tokens", *columns.values()), rows)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
