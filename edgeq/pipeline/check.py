"""Judge a float model against targets, by the rules and operator by operator, before any calibration or conversion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import onnx

from edgeq.backends.contract import JudgesOperators, OperatorVerdict
from edgeq.backends.registry import find
from edgeq.errors import Unsupported
from edgeq.frontend import locate
from edgeq.graph import external_data
from edgeq.graph.read import read_onnx
from edgeq.pipeline import stages
from edgeq.quantization import schemes
from edgeq.records import FileRef, QdqModel, Record, Scheme, Target
from edgeq.system.cache import Cache
from edgeq.system.files import file_ref

_NAMED = 3  # nodes that a sentence names


class CheckedOperator(Record):
    """Hold the verdict on the nodes of one operator that share it, with the reason."""

    operator: str
    count: int
    verdict: Literal["supported", "on-host", "refused", "unknown"]
    why: str
    nodes: tuple[str, ...]


class Checked(Record):
    """Hold the verdicts on a model for one target, and one sentence for each reason that prevents its conversion."""

    target: str
    operators: tuple[CheckedOperator, ...]
    host_operators: tuple[str, ...]
    problems: tuple[str, ...]


def check(
    model: str, targets: Sequence[Target], pooling: str | None, cache: Cache, tower: str | None = None
) -> tuple[Checked, ...]:
    """Check a model for each target.

    Args:
        model: as `edgeq export` takes it, or the path of an ONNX file.
        targets: to check the model for.
        pooling: of a plain Hugging Face directory.
        cache: for the exported float model.
        tower: "text" or "image", of a model that embeds both.

    Raises:
        ConfigError: the model is not there, or a target names an unknown backend or scheme.
        Unsupported: the exported graph holds operators that no backend takes.
        ToolMissing: the model must be exported first, and the extra `export` is not installed.
    """
    path = Path(model)
    if path.suffix == ".onnx":
        graph, file = read_onnx(path), file_ref(path)
    else:
        floats = stages.float_model(locate.locate(model, pooling, tower=tower), True, cache)
        graph, file = external_data.load(Path(floats.model.file.path)), floats.model.file
    return tuple(_check(graph, file, target) for target in targets)


def require(checks: Iterable[Checked]) -> None:
    """Raise where a check found problems.

    Raises:
        Unsupported: the message lists every problem of every target.
    """
    problems = [f"  - {item.target}: {problem}" for item in checks for problem in item.problems]
    if problems:
        raise Unsupported("the model cannot be converted as the targets ask:\n" + "\n".join(problems))


def _check(model: onnx.ModelProto, file: FileRef, target: Target) -> Checked:
    backend, scheme = find(target.backend, target.name), schemes.find(target.scheme, target.name)
    if isinstance(backend, JudgesOperators):
        verdicts = backend.operator_verdicts(model, scheme, target)
    else:
        why = f"{target.backend} has no rules for single operators; lowering decides"
        verdicts = tuple(
            OperatorVerdict(node.name or node.output[0], node.op_type, "unknown", why, ()) for node in model.graph.node
        )
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(item.name for item in model.graph.input if item.name not in stored)
    rejected = backend.rejections(unquantised(file, inputs, scheme), target)
    problems = [f"{item.rule} Found: {item.detail}" for item in rejected]
    problems += [f"{item.operator} ({item.node}): {item.why}." for item in verdicts if item.verdict == "refused"]
    on_host = [f"{name} ({item.node})" for item in verdicts for name in item.host_operators]
    if len(on_host) > target.gate.host_operators_max:
        problems.append(
            f"{len(on_host)} operators stay on the host ({', '.join(on_host)}); "
            f"at most {target.gate.host_operators_max} may."
        )
    return Checked(
        target=target.name,
        operators=_grouped(verdicts),
        host_operators=tuple(on_host),
        problems=tuple(problems),
    )


def unquantised(file: FileRef, inputs: tuple[str, ...], scheme: Scheme) -> QdqModel:
    """Give a record of a model that is not quantised yet, for the rules that read inputs, scheme and target alone."""
    return QdqModel(
        file=file, float_model_sha256=file.sha256, calibration_sha256=file.sha256, scheme=scheme,
        inputs=inputs, outputs=("sentence_embedding",), dim=1, max_sequence=1,
        integer_matmuls=(), float_matmuls=(),
    )  # fmt: skip


def _grouped(verdicts: Iterable[OperatorVerdict]) -> tuple[CheckedOperator, ...]:
    groups: dict[tuple[str, str, str], list[OperatorVerdict]] = {}
    for item in verdicts:
        groups.setdefault((item.operator, item.verdict, item.why), []).append(item)
    return tuple(
        CheckedOperator(
            operator=operator, count=len(items), verdict=items[0].verdict, why=why,
            nodes=tuple(item.node for item in items[:_NAMED]),
        )
        for (operator, _, why), items in sorted(groups.items())
    )  # fmt: skip
