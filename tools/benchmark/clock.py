"""Time models side by side: latency at batch 1, throughput in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from benchmark.figures import Blank, Figures
from benchmark.making import Made, note
from benchmark.processes import first_line
from benchmark.rows import (
    AEQ,
    FLOAT,
    GEMM,
    GEMM_OPENVINO,
    INT,
    INT16,
    LITERT_FLOAT,
    NNCF,
    OPENVINO_FLOAT,
    ORT_DYNAMIC,
    ST_ONNX,
)  # fmt: skip
from benchmark.runners import Runner
from edgeq.errors import EdgeqError

SEQUENCES = (16, 32, 128, 256)
BATCH, BATCH_SEQUENCE = 32, 64
ROUNDS = 5
_TURN_MS = 500.0  # how long a model runs before the next has its turn
_RUNS = (5, 60)

# Time of the first over time of the second, in the same round. Below 1 the first is faster.
RATIOS = {
    "ort_of_float32": (GEMM, FLOAT),
    "ort_of_dynamic": (GEMM, ORT_DYNAMIC),
    "ort_of_sentence_transformers": (GEMM, ST_ONNX),
    "openvino_of_nncf": (GEMM_OPENVINO, NNCF),
    "openvino_of_float": (GEMM_OPENVINO, OPENVINO_FLOAT),
    "tflite_of_float": (INT, LITERT_FLOAT),
    "tflite16_of_float": (INT16, LITERT_FLOAT),
    "tflite_of_ai_edge_quantizer": (INT, AEQ),
}

Rounds = dict[str, list[float] | Blank]  # row -> median of each round, in milliseconds


def latencies(made: Sequence[Made], sequences: Sequence[int] = SEQUENCES) -> Figures:
    """Time every model at batch 1."""
    found = {str(sequence): rounds_of(made, 1, sequence) for sequence in sequences}
    return {
        "models": {at: {row: summary(rounds) for row, rounds in each.items()} for at, each in found.items()},
        "ratios": {at: ratios(each) for at, each in found.items()},
    }


def throughputs(made: Sequence[Made]) -> Figures:
    """Count the texts a second in batches."""
    static = Blank("its shapes are static with batch 1")
    found = rounds_of([item for item in made if item.row.is_batched], BATCH, BATCH_SEQUENCE)
    blanks = {item.row.name: static for item in made if not item.row.is_batched}
    speeds = {name: _inverse(summary(rounds), BATCH * 1e3) for name, rounds in found.items()}
    return {"models": speeds | blanks, "ratios": {key: _inverse(value, 1.0) for key, value in ratios(found).items()}}


def _inverse(figure: float | Blank, over: float) -> float | Blank:
    return figure if isinstance(figure, Blank) else over / figure


def rounds_of(made: Sequence[Made], batch: int, sequence: int) -> Rounds:
    """Time models, each in a process of its own that lives through all rounds; in a round each has one turn.

    The machine may change its speed between rounds: what is compared is compared within a round.
    """
    note(f"timing {batch} x {sequence} tokens")
    rounds: Rounds = {}
    runs: dict[str, int] = {}
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for item in made:
            name = item.row.name
            if item.path is None:
                rounds[name] = Blank(item.reason)
                continue
            try:
                runners[name] = stack.enter_context(Runner(item, item.row.threads))
                first = runners[name].milliseconds(batch, sequence, 3, 2)
            except EdgeqError as error:
                rounds[name] = Blank(first_line(error))
                runners.pop(name, None)
                continue
            runs[name], rounds[name] = runs_in_turn(float(np.median(first))), []
        for _ in range(ROUNDS):
            for name, runner in runners.items():
                rounds[name].append(float(np.median(runner.milliseconds(batch, sequence, runs[name], 2))))  # type: ignore[union-attr]
    return rounds


def runs_in_turn(milliseconds: float) -> int:
    """Say how many runs make a turn."""
    least, most = _RUNS
    return int(np.clip(round(_TURN_MS / milliseconds), least, most))


def summary(rounds: list[float] | Blank) -> float | Blank:
    """Give the median of the rounds."""
    return rounds if isinstance(rounds, Blank) else float(np.median(rounds))


def ratios(rounds: Mapping[str, list[float] | Blank]) -> Figures:
    """Give the median over the rounds of each ratio within a round."""
    made: Figures = {}
    for key, (first, second) in RATIOS.items():
        if first not in rounds or second not in rounds:
            continue
        times = [rounds[first], rounds[second]]
        blank = next((item for item in times if isinstance(item, Blank)), None)
        made[key] = blank or float(np.median(np.divide(*times)))
    return made
