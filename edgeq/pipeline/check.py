"""Check a float model for targets: run the real rewrites and quantiser on a few random texts, and collect refusals.

Nothing is calibrated, compiled or written. What follows from the model's structure is certain; what follows from the
ranges that random texts have is said to be possible, because the user's own texts have others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from edgeq.calibration.statistics import Observed
from edgeq.data.batches import PIXELS, Samples
from edgeq.data.probes import random_images, random_texts
from edgeq.errors import Unsupported
from edgeq.frontend import locate
from edgeq.frontend.model_kind import refuse_around
from edgeq.frontend.onnx.foreign_inputs import refuse_bag
from edgeq.graph import dialect, external_data
from edgeq.graph.edit import constant, dims
from edgeq.graph.read import read_onnx
from edgeq.pipeline import stages, structure
from edgeq.pipeline.calibrate import calibrate_on_probes
from edgeq.quantization import schemes
from edgeq.quantization.qdq import Quantized
from edgeq.quantization.quantize import QUANTIZERS
from edgeq.quantization.walk import Refusal
from edgeq.records import FileRef, Island, Record, Scheme, Target
from edgeq.system.cache import Cache
from edgeq.system.files import file_ref

Verdict = Literal["supported", "on-host", "refused", "possible", "unknown"]

_NAMED = 3  # nodes that a sentence names
_NO_LIMIT = 1 << 20  # tokens


class CheckedOperator(Record):
    """Say what becomes of the nodes of one operator that share a verdict.

    `operator` is one of the float model's, or one that a rewrite writes; with "on-host", one of the runtime's.
    """

    operator: str
    count: int
    verdict: Verdict
    why: str
    nodes: tuple[str, ...]


class Checked(Record):
    """Hold a model's check for one target.

    `problems` has one sentence for each reason not to convert that follows from structure; `possible_problems` those
    that random texts gave rise to, and that the user's own need not.
    """

    target: str
    operators: tuple[CheckedOperator, ...]
    host_operators: tuple[str, ...]
    problems: tuple[str, ...]
    possible_problems: tuple[str, ...]


@dataclass(frozen=True)
class _Subject:
    """Hold a float model and what quantising it takes.

    Attributes:
        model: FP32 ONNX.
        file: that it was read from.
        max_sequence: its limit in tokens.
        equalized: the equalised model with statistics of random texts; None where the model leaves the dialect.
        outside: what no target takes.
        islands: what only targets that keep floats take.
    """

    model: onnx.ModelProto
    file: FileRef
    max_sequence: int
    equalized: tuple[onnx.ModelProto, Observed] | None
    outside: tuple[Refusal, ...]
    islands: tuple[Island, ...]


def check(
    model: str,
    targets: Sequence[Target],
    pooling: str | None,
    cache: Cache,
    tower: str | None = None,
    trust_remote_code: bool | None = None,
) -> tuple[Checked, ...]:
    """Check a model for each target.

    Args:
        model: as `edgeq export` takes it, or the path of a float model's ONNX file.
        targets: to check the model for.
        pooling: of a plain Hugging Face directory.
        cache: for the exported float model.
        tower: "text" or "image", of a model that embeds both.
        trust_remote_code: whether the model's own code may run.

    Raises:
        ConfigError: the model is not there, or a target names an unknown backend or scheme.
        Unsupported: the exported graph holds operators that no backend takes.
        ToolMissing: the model must be exported first, and the extra `export` is not installed.
    """
    path = Path(model)
    if path.suffix == ".onnx":
        refuse_around(path)
        given = read_onnx(path)
        refuse_bag(ir.from_proto(given), path.name)
        return check_float_model(given, file_ref(path), None, targets)
    located = locate.locate(model, pooling, tower=tower, trust_remote_code=trust_remote_code)
    floats = stages.float_model(located, True, cache)
    loaded = external_data.load(Path(floats.model.file.path))
    return check_float_model(loaded, floats.model.file, floats.model.max_sequence, targets, floats.model.islands)


def check_float_model(
    model: onnx.ModelProto,
    file: FileRef,
    max_sequence: int | None,
    targets: Sequence[Target],
    islands: tuple[Island, ...] | None = None,
) -> tuple[Checked, ...]:
    """Check a float model that is loaded already, for each target.

    Args:
        model: FP32 ONNX.
        file: that it was read from.
        max_sequence: its limit in tokens; None takes that of its table of positions.
        targets: to check the model for.
        islands: what stays float, with its lines of Python; None looks for it.
    """
    subject = _subject(model, file, max_sequence, dialect.islands(model) if islands is None else islands)
    return tuple(_check(subject, target) for target in targets)


def require(checks: Iterable[Checked]) -> None:
    """Raise where a check found problems.

    Raises:
        Unsupported: the message lists every problem of every target.
    """
    problems = [f"  - {item.target}: {problem}" for item in checks for problem in item.problems]
    if problems:
        raise Unsupported("the model cannot be converted as the targets ask:\n" + "\n".join(problems))


def _subject(model: onnx.ModelProto, file: FileRef, max_sequence: int | None, islands: tuple[Island, ...]) -> _Subject:
    """Verify the dialect, equalise, and observe a few random texts or images."""
    outside = tuple(_outside(item) for item in dialect.violations(model))
    graph = ir.from_proto(model).graph
    limit = max_sequence or _positions(graph)
    equalized = None if outside else calibrate_on_probes(model, _samples(graph, limit))
    return _Subject(model, file, limit, equalized, outside, islands)


def _outside(item: dialect.Violation) -> Refusal:
    node = item.node
    sentence = f"the graph leaves the dialect of float models: {item.sentence}"
    return Refusal(node.name or node.output[0] if node else "", node.op_type if node else "", sentence, True)


def _samples(graph: ir.Graph, limit: int) -> Samples:
    images = next((item for item in graph.inputs if item.name == PIXELS), None)
    if images is None:
        return random_texts(_token_ids(graph), limit)
    return random_images([size for size in dims(images) or () if isinstance(size, int)])


def _token_ids(graph: ir.Graph) -> list[int]:
    """List the tokens whose embedding is not zero, as that of the padding token is."""
    tables = [
        table
        for node in graph
        if node.op_type == "Gather" and (table := constant(node.inputs[0])) is not None
        and node.inputs[1] is not None and node.inputs[1].name == "input_ids"
    ]  # fmt: skip
    return np.flatnonzero(np.abs(tables[0]).max(axis=tuple(range(1, tables[0].ndim)))).tolist() if tables else [0]


def _positions(graph: ir.Graph) -> int:
    """Give how many rows the shortest table of positions has: the limit of a file that states none."""
    tables = [constant(node.inputs[0]) for node in graph if node.op_type == "Slice"]
    rows = [table.shape[-2] for table in tables if table is not None and table.ndim > 1]
    return min(rows, default=_NO_LIMIT)


def _check(subject: _Subject, target: Target) -> Checked:
    scheme = schemes.find(target.scheme, target.name)
    stored = {tensor.name for tensor in subject.model.graph.initializer}
    inputs = tuple(item.name for item in subject.model.graph.input if item.name not in stored)
    islands = structure.island_refusals(subject.islands, scheme, target, Path(subject.file.path))
    equalized = None if islands else subject.equalized
    trial = structure.tried(equalized, subject.file, inputs, subject.max_sequence, scheme, target)
    refusals = [*subject.outside, *trial.refusals]
    problems = [*islands, *(item.sentence for item in subject.outside), *trial.problems(target)]
    possible = [item.sentence for item in refusals if not item.is_certain]
    on_host = trial.plan.on_host
    rows: list[CheckedOperator] = []
    if trial.missing:
        rows.append(CheckedOperator(operator="-", count=0, verdict="unknown", why=trial.missing, nodes=()))
    rows += _of_model(subject, trial.quantized, scheme, refusals)
    rows += _grouped((item.operator, item.output, "on-host", item.why) for item in on_host)
    return Checked(
        target=target.name,
        operators=tuple(rows),
        host_operators=tuple(f"{item.operator} ({item.output})" for item in on_host),
        problems=tuple(dict.fromkeys(problems)),
        possible_problems=tuple(dict.fromkeys([*possible, *trial.plan.possible])),
    )


def _of_model(
    subject: _Subject, quantized: Quantized | None, scheme: Scheme, refusals: Sequence[Refusal]
) -> tuple[CheckedOperator, ...]:
    """Give the rows of the float model's own operators, and of the refused ones that a rewrite wrote."""
    refused = {item.node: item for item in refusals}
    nodes = {node.name or node.output[0]: node for node in subject.model.graph.node}
    islands = {node.name or node.output[0] for node in dialect.island_nodes(subject.model)}
    keeps_float = QUANTIZERS[scheme.kind].keeps_float
    found: list[tuple[str, str, Verdict, str]] = []
    for name, node in nodes.items():
        if name in refused:
            found.append(_refused(refused[name]))
        elif name in islands and not keeps_float:
            found.append((node.op_type, name, "refused", "outside the dialect: it has no integer form"))
        elif quantized is None or refusals:
            found.append((node.op_type, name, "unknown", "nothing was quantised; see the problems"))
        elif name in islands:
            found.append((node.op_type, name, "supported", "a float island: outside the dialect, it stays float"))
        else:
            found.append((node.op_type, name, "supported", _becomes(node, quantized, scheme)))
    found += [_refused(item) for item in refusals if item.node not in nodes]
    return _grouped(found)


def _refused(item: Refusal) -> tuple[str, str, Verdict, str]:
    return item.operator or "-", item.node, "refused" if item.is_certain else "possible", item.sentence


def _becomes(node: onnx.NodeProto, quantized: Quantized, scheme: Scheme) -> str:
    """Say whether an operator computes with integers or stays float."""
    kind = QUANTIZERS[scheme.kind]
    if not kind.keeps_float:
        return "integer"
    is_product = node.name in quantized.integer_products
    if not kind.writes_integers:
        return (
            "an integer product, if the vendor's compiler keeps it" if is_product else "the vendor's compiler decides"
        )
    return "an integer product" if is_product else "stays float"


def _grouped(found: Iterable[tuple[str, str, Verdict, str]]) -> tuple[CheckedOperator, ...]:
    """Put nodes of one operator, verdict and reason together, by operator."""
    groups: dict[tuple[str, Verdict, str], list[str]] = {}
    for operator, node, verdict, why in found:
        groups.setdefault((operator, verdict, why), []).append(node)
    return tuple(
        CheckedOperator(operator=operator, count=len(nodes), verdict=verdict, why=why, nodes=tuple(nodes[:_NAMED]))
        for (operator, verdict, why), nodes in sorted(groups.items())
    )
