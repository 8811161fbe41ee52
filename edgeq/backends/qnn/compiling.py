"""Compile one bucket to a context binary in a child process, and check that HTP takes every node."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from edgeq.errors import ChildDied, LoweringFailed
from edgeq.records import Target
from edgeq.system.cache import log_path
from edgeq.system.files import storage_errors
from edgeq.system.worker import Worker

COMMAND = (sys.executable, "-m", "edgeq.backends.qnn.child")
CONTEXT, BINARY = "model_seq_{}_ctx.onnx", "model_seq_{}_ctx_qnn.bin"  # the second name is the compiler's own
PROVIDER = "QNNExecutionProvider"
LOGS = "qnn-logs"  # their kind in `edgeq cache`
COMPILE_LIMIT_S = 600.0
_READINGS = 3

# The log lines of ONNX Runtime and the compiler about an operator that they refuse.
# Source: onnxruntime-qnn 2.7.0, qnn_execution_provider.cc (GetCapabilityImpl) and qnn_model_wrapper.cc (CreateQnnNode).
_REFUSED = (
    re.compile(r"\{ name: (?P<name>[^,}]+), type: (?P<type>\w+) \}"),
    re.compile(r"failed for node `(?P<name>[^`]+)` of type `(?P<type>\w+)`"),
)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_LOG_LINES = 6


@dataclass(frozen=True)
class Compiled:
    """Hold the result of compiling one bucket.

    Attributes:
        products: names of the weight products on HTP.
        operators: number of each operator on HTP.
        info: the binary's description, from `context_info`.
    """

    products: frozenset[str]
    operators: dict[str, int]
    info: dict[str, Any]


def worker(time_limit_s: float) -> Worker:
    """Start a child process that compiles, describes or runs context binaries.

    Raises:
        ToolMissing: the interpreter cannot be started.
    """
    return Worker(COMMAND, "onnxruntime-qnn", time_limit_s=time_limit_s)


def options(target: Target) -> dict[str, str]:
    """Give the QNN provider's options for a target."""
    runtime = target.runtime
    return {
        "htp_arch": str(runtime["htp_arch"]),
        "soc_model": str(runtime["soc_model"]),
        "vtcm_mb": str(runtime["vtcm_mb"]),
        "htp_graph_finalization_optimization_mode": str(runtime["optimization_mode"]),
    }


def compile_bucket(model: onnx.ModelProto, length: int, target: Target, folder: Path) -> Compiled:
    """Write `model_seq_LENGTH_ctx.onnx` and its binary into a folder.

    Args:
        model: the QDQ model for one text of `length` tokens.
        length: in tokens.
        target: with the SoC and the compiler's settings.
        folder: an existing one, where nothing is kept when this raises.

    Raises:
        LoweringFailed: the compiler refuses an operator, dies, or wrote a wrong binary; the message names the operator
            if the log does, and the path of the log.
    """
    source, context = folder / f"seq_{length}.onnx", folder / CONTEXT.format(length)
    log = log_path(LOGS, target.name, f"seq_{length}")
    with storage_errors(f"writing {source.name}"):
        source.write_bytes(model.SerializeToString(deterministic=True))
    try:
        with worker(COMPILE_LIMIT_S) as child:
            reply = child.call(
                do="compile", model=str(source), context=str(context), options=options(target), log=str(log)
            )
        [info] = described([folder / BINARY.format(length)])
    except LoweringFailed as error:
        raise LoweringFailed(explained(str(error), log, target, length)) from error
    finally:
        source.unlink(missing_ok=True)
    operators, products = operators_on_htp(reply["partitions"], target.name)
    problems = mismatches(info, target, length)
    if problems:
        raise LoweringFailed(
            f"{target.name}: the binary for {length} tokens is not what was asked for: {'; '.join(problems)}. "
            "Check soc_model and htp_arch in the target: the first silently wins over the second."
        )
    return Compiled(products, operators, info)


def described(binaries: Sequence[Path]) -> list[dict[str, Any]]:
    """Describe context binaries, in a child process that does nothing else.

    In a process that has compiled before, libQnnSystem of QAIRT 2.51 sometimes reads beyond its stack and dies of
    SIGSEGV on bytes that it reads well the next time: in 3 of 900 readings, and in none of 600 in processes of their
    own. A crash is therefore retried twice.

    Raises:
        LoweringFailed: the library does not know a file, or crashed each time.
    """
    for _ in range(_READINGS - 1):
        with contextlib.suppress(ChildDied):
            return _read(binaries)
    return _read(binaries)


def _read(binaries: Sequence[Path]) -> list[dict[str, Any]]:
    with worker(COMPILE_LIMIT_S) as child:
        return [child.call(do="describe", path=str(path.resolve())) for path in binaries]


def explained(what: str, log: Path, target: Target, length: int) -> str:
    """Make a message with the operators that a log names, its last lines, and its path."""
    text = _COLOURS.sub("", log.read_text(encoding="utf-8", errors="replace")) if log.is_file() else ""
    found = [match for pattern in _REFUSED for match in pattern.finditer(text)]
    refused = dict.fromkeys(f"{match['name']} ({match['type']})" for match in found)
    lines = [line for line in text.strip().splitlines() if line.strip()][-_LOG_LINES:]
    head = f"{target.name}: compiling for {length} tokens failed"
    if refused:
        head += f"; HTP refuses {', '.join(refused)}"
    last = "\n".join(f"  {line[:300]}" for line in lines)
    return f"{head}: {what}\nThe log ends with:\n{last}\nAll of it lies in {log}."


def operators_on_htp(partitions: Sequence[Mapping[str, Any]], name: str) -> tuple[dict[str, int], frozenset[str]]:
    """Give the number of each operator on HTP, and the names of its weight products.

    Raises:
        LoweringFailed: the graph has several partitions, or a node stayed on the CPU; each is named.
    """
    elsewhere = [
        f"{node[1]} ({node[0]}) on {part['provider']}"
        for part in partitions
        if part["provider"] != PROVIDER
        for node in part["nodes"]
    ]
    count = sum(part["provider"] == PROVIDER for part in partitions)
    if elsewhere or count != 1:
        listed = f"; elsewhere: {', '.join(elsewhere)}" if elsewhere else ""
        raise LoweringFailed(f"{name}: HTP takes the graph in {count} partitions{listed}. One of all nodes is needed.")
    nodes = [node for part in partitions for node in part["nodes"]]
    products = frozenset(node[1] for node in nodes if node[0] == "Gemm")
    return dict(sorted(Counter(node[0] for node in nodes).items())), products


def mismatches(info: Mapping[str, Any], target: Target, length: int) -> list[str]:
    """List the differences between a binary's description and its target's demands."""
    is_quantized = target.runtime["io"] == "quantized"
    ids, vector = ("int32", "uint16 codes") if is_quantized else ("int64", "float32")
    inputs = {(item["name"], item["dtype"], tuple(item["shape"])) for item in info["inputs"]}
    wanted_inputs = {(name, ids, (1, length)) for name in ("input_ids", "attention_mask")}
    outputs = [(item["name"], item["dtype"]) for item in info["outputs"]]
    checks = (
        ("it is for SoC", info["soc_model"], target.runtime["soc_model"]),
        ("graphs", info["graphs"], 1),
        ("its inputs are", sorted(inputs), sorted(wanted_inputs)),
        ("its outputs are", outputs, [("sentence_embedding", vector)]),
    )
    return [f"{what} {found}, {wanted} is needed" for what, found, wanted in checks if found != wanted]
