"""Tell what targets refuse in a float model by its structure: run the real rewrites and quantisers on made-up ranges.

Nothing is embedded, calibrated, compiled or written, so an export asks before it calibrates. What follows from ranges
is left to the calibration, which knows them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from edgeq.backends.contract import Backend, LoadsFloatModels, Plan, PlansOperators, Rejection
from edgeq.backends.registry import find
from edgeq.calibration.observe import tensor_shapes
from edgeq.calibration.statistics import Observed, Statistics
from edgeq.data.tokens import bucket_lengths
from edgeq.errors import EdgeqError, ToolMissing, Unsupported
from edgeq.frontend.first_layer import first_layer
from edgeq.frontend.float_model import write_float_model
from edgeq.frontend.locate import Located
from edgeq.graph import channel_axis, external_data
from edgeq.graph.edit import infer_shapes
from edgeq.pipeline import stages
from edgeq.pipeline.calibrate import decomposed
from edgeq.quantization import schemes
from edgeq.quantization.qdq import Quantized
from edgeq.quantization.quantize import QUANTIZERS, quantize
from edgeq.quantization.walk import Refusal
from edgeq.records import FileRef, FloatModel, Island, QdqModel, Scheme, Target
from edgeq.system.cache import Cache
from edgeq.system.files import work_dir
from edgeq.targets import list_targets

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """Hold what quantising a float model for one target found.

    Attributes:
        rejected: the backend's rules that model and target do not meet; nothing was tried then.
        quantized: the QDQ model; None where nothing was tried.
        refusals: of the quantiser.
        plan: what lowering would write.
        missing: the tool that would say so and is not installed, with the command that installs it.
    """

    rejected: tuple[Rejection, ...]
    quantized: Quantized | None = None
    refusals: list[Refusal] = field(default_factory=list)
    plan: Plan = field(default_factory=Plan)
    missing: str = ""

    def problems(self, target: Target) -> list[str]:
        """Give one sentence for each reason not to convert that follows from the structure, each once."""
        found = [f"{item.rule} Found: {item.detail}" for item in self.rejected]
        found += [item.sentence for item in self.refusals if item.is_certain]
        found += self.plan.problems
        on_host = self.plan.on_host
        if len(on_host) > target.gate.host_operators_max:
            named = ", ".join(f"{item.operator} ({item.output})" for item in on_host)
            found.append(
                f"{len(on_host)} operators stay on the host ({named}); at most {target.gate.host_operators_max} may."
            )
        return list(dict.fromkeys(found))


def tried(
    equalized: tuple[onnx.ModelProto, Observed] | None,
    file: FileRef,
    inputs: tuple[str, ...],
    max_sequence: int,
    scheme: Scheme,
    target: Target,
) -> Trial:
    """Hold a float model against the rules of a target, and quantise it by its scheme.

    Args:
        equalized: a float model with statistics of its tensors, observed or made up; None tries nothing.
        file: that it was read from.
        inputs: of the model.
        max_sequence: its limit in tokens.
        scheme: of the target.
        target: whose rules count.
    """
    backend: Backend = find(target.backend, target.name)
    rejected = backend.rejections(unquantised(file, inputs, scheme), target)
    if rejected or equalized is None:
        return Trial(rejected)
    refusals: list[Refusal] = []
    quantized = quantize(*equalized, scheme, refusals)
    plan, missing = Plan(), ""
    if not refusals and isinstance(backend, PlansOperators):
        bucket = max(bucket_lengths(target.buckets_tokens, max_sequence))
        try:
            plan = backend.planned(ir.from_proto(quantized.model), bucket, target)
        except ToolMissing as error:
            missing = str(error)
    return Trial(rejected, quantized, refusals, plan, missing)


def require(model: onnx.ModelProto, record: FloatModel, asked: Sequence[tuple[Target, Scheme]]) -> None:
    """Refuse a float model that targets cannot take by its structure, before anything is calibrated.

    Args:
        model: the float model, loaded.
        record: of it.
        asked: the targets, each with its scheme.

    Raises:
        Unsupported: the message lists every reason of every target.
    """
    statistics: Observed | None = None
    trials: dict[str, Trial] = {}  # targets of one scheme and backend share one
    said: dict[str, list[str]] = {}
    refusing: set[str] = set()  # backends that leave tensors float and lack an island's operator
    for target, scheme in asked:
        floats = island_refusals(record.islands, scheme, target, Path(record.file.path))
        if floats:
            refusing.add(target.backend)
        key = f"{target.backend} {scheme.model_dump_json()} {target.buckets_tokens} {target.runtime}"
        if key not in trials:
            is_needed = not floats and QUANTIZERS[scheme.kind].may_refuse
            if is_needed and statistics is None:
                statistics = made_up(model)
            equalized = (model, statistics) if is_needed and statistics is not None else None
            with np.errstate(all="ignore"):  # made-up ranges are no numbers that a model computes
                trials[key] = tried(equalized, record.file, record.inputs, record.max_sequence, scheme, target)
        if problems := [*floats, *trials[key].problems(target)]:
            said.setdefault("\n".join(f"  - {problem}" for problem in problems), []).append(target.name)
    if said:
        listed = "\n".join(f"{', '.join(names)}: cannot take this model:\n{why}" for why, names in said.items())
        raise Unsupported(f"{listed}\nNothing was calibrated. {_way_out(record.islands, refusing)}")


def require_of_first_layer(
    located: Located, has_hidden_state: bool, asked: Sequence[tuple[Target, Scheme]], cache: Cache
) -> None:
    """Refuse what targets cannot take in the first layer of a large model, before the whole is exported.

    A copy that does not load or does not trace decides nothing: the whole model says why.

    Args:
        located: the model.
        has_hidden_state: whether the float model has an output for it.
        asked: the targets, each with its scheme.
        cache: that may hold the whole float model already, which then decides within seconds, too.

    Raises:
        Unsupported: the message lists every reason of every target.
    """
    if not any(QUANTIZERS[scheme.kind].may_refuse for _, scheme in asked) or stages.has_float_model(
        located, has_hidden_state, cache
    ):
        return
    with work_dir() as folder:
        copy, written = first_layer(located, folder / "model"), folder / "float"
        if copy is None:
            return
        written.mkdir()
        try:
            _, record = write_float_model(copy, written, has_hidden_state)
        except EdgeqError as error:
            _log.debug("%s: a copy with one layer was not exported: %s", located.name, error)
            return
        require(external_data.load(Path(record.file.path)), record, asked)


def island_refusals(islands: Sequence[Island], scheme: Scheme, target: Target, model: Path) -> list[str]:
    """Refuse operators outside the dialect where a scheme leaves nothing float, or the runtime lacks one of them.

    Args:
        islands: of the float model.
        scheme: of the target.
        target: whose runtime loads the float model, if it has islands.
        model: the float model's file.
    """
    if QUANTIZERS[scheme.kind].keeps_float:
        backend = find(target.backend, target.name)
        if not islands or not isinstance(backend, LoadsFloatModels):
            return []
        try:
            reason = backend.refused_operator(model)
        except ToolMissing:  # lowering says so
            return []
        return [] if reason is None else [f"float islands: {', '.join(item.operator for item in islands)}. {reason}"]
    return [
        f"{island.operator} ({island.place}): outside edgeq's dialect, and {scheme.name} leaves nothing float."
        for island in islands
    ]


def _way_out(islands: Sequence[Island], refusing: Collection[str]) -> str:
    if not islands:
        return "`edgeq check MODEL --target NAME` says which other targets take it."
    others = [each for each in list_targets() if each.backend not in refusing]
    keep_floats = [each for each in others if QUANTIZERS[schemes.find(each.scheme, each.name).kind].keeps_float]
    return (
        f"Targets that keep floats take {', '.join(item.operator for item in islands)} as float islands: "
        f"{', '.join(each.name for each in keep_floats)}. Else write that part with operators of "
        "edgeq.graph.operators.DIALECT, or leave it out of the model."
    )


def unquantised(file: FileRef, inputs: tuple[str, ...], scheme: Scheme) -> QdqModel:
    """Give a record of a model that is not quantised yet, for the rules that read inputs, scheme and target alone."""
    return QdqModel(
        file=file, float_model_sha256=file.sha256, calibration_sha256=file.sha256, scheme=scheme,
        inputs=inputs, outputs=("sentence_embedding",), dim=1, max_sequence=1,
        integer_matmuls=(), float_matmuls=(),
    )  # fmt: skip


def made_up(model: onnx.ModelProto) -> Observed:
    """Give statistics as if every channel of every tensor that a quantiser asks for lay between -1 and 1.

    Args:
        model: FP32 ONNX in the dialect; not changed.
    """
    expanded, names, means = decomposed(model)
    shaped = infer_shapes(ir.to_proto(expanded))
    axes, shapes = channel_axis.by_name(shaped), tensor_shapes(shaped)
    found = {name: _between(-1.0, 1.0, _channels(name, axes, shapes)) for name in names}
    for name in means:
        found[name].mean = np.zeros_like(found[name].minimum)
    return found


def _channels(name: str, axes: Mapping[str, int], shapes: Mapping[str, tuple[int | None, ...]]) -> int:
    """Count the channels of a tensor; 1 where their axis is not known."""
    return shapes[name][axes[name]] or 1 if name in axes and name in shapes else 1


def _between(low: float, high: float, channels: int) -> Statistics:
    return Statistics(np.full(channels, low, np.float32), np.full(channels, high, np.float32))
