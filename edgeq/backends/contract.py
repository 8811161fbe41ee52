"""Define a backend: a module with the functions of `Backend`, and those of optional protocols beside.

Every backend satisfies `Backend`: `tools`, `rejections`, `lower`, `load`. Some add a function that `isinstance` finds
through a runtime protocol: `operator_verdicts` (`JudgesOperators`), `other_settings` (`HasOtherSettings`),
`client_settings` (`HasClientSettings`), `environments` (`NeedsEnvironments`), `obstacle` (`NeedsDevice`). A session may
satisfy `TimesItself`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import onnx_ir as ir

from edgeq.data.batches import PIXELS, AnyFeeds
from edgeq.data.sessions import Session
from edgeq.graph import external_data
from edgeq.records import Artifact, QdqModel, RunKind, SchemeKind, Target
from edgeq.system.environments import Environment


@dataclass(frozen=True)
class Rejection:
    """Hold the sentence of a rule that a model or target does not meet, and the offending detail."""

    rule: str
    detail: str


@dataclass(frozen=True)
class HostStay:
    """Name a runtime's operator that an accelerator's rules leave to the host.

    Attributes:
        operator: of the runtime, e.g. "GATHER".
        output: the tensor that it gives.
        why: the rule's sentence.
    """

    operator: str
    output: str
    why: str


@dataclass(frozen=True)
class Plan:
    """Say what lowering would write, before any compiler runs.

    Attributes:
        on_host: the operators that stay on the host.
        problems: one sentence for each reason not to lower that follows from the model's structure.
        possible: the same for reasons that follow from the ranges of a calibration.
    """

    on_host: tuple[HostStay, ...] = ()
    problems: tuple[str, ...] = ()
    possible: tuple[str, ...] = ()


@runtime_checkable
class PlansOperators(Protocol):
    """A backend that can say what lowering a QDQ model would write, without a compiler."""

    def planned(self, model: ir.Model, bucket: int, target: Target) -> Plan:
        """Write a QDQ model for one sequence length in memory, and hold what was written against the rules.

        Raises:
            ToolMissing: what writes the format is not installed.
        """
        ...


@runtime_checkable
class LoadsFloatModels(Protocol):
    """A backend that can say whether its runtime has every operator of a float model, before that is quantised."""

    def refused_operator(self, path: Path) -> str | None:
        """Load a float model, and give the runtime's reason why it cannot, or None.

        Raises:
            ToolMissing: the runtime is not installed.
        """
        ...


# A rule gives the offending detail, or None where it is met; its docstring is the sentence shown to the user.
Rule = Callable[[QdqModel, Target], str | None]


def has_buckets(model: QdqModel, target: Target) -> str | None:
    """The runtime takes static shapes: the target needs sequence lengths of at least 2 tokens, each once."""
    buckets = target.buckets_tokens
    is_right = buckets and len(set(buckets)) == len(buckets) and min(buckets) >= 2
    return None if is_right else f"buckets_tokens is {list(buckets)}"


def fits_one_file(model: QdqModel, target: Target) -> str | None:
    """The integer model must be below 2 GB, which is about 8 GB in FP32."""
    is_float = model.file.sha256 == model.float_model_sha256  # `rejections` is called before quantising, too
    size = 0 if is_float else external_data.file_size_bytes(Path(model.file.path))
    return f"{size / 1e9:.1f} GB" if size > external_data.LARGE_BYTES else None


def rejected(rules: Iterable[Rule], model: QdqModel, target: Target) -> tuple[Rejection, ...]:
    """Give a rejection for each rule that a model and a target do not meet, and for `fits_one_file`."""
    found = [(rule.__doc__ or rule.__name__, rule(model, target)) for rule in (fits_one_file, *rules)]
    return tuple(Rejection(sentence, detail) for sentence, detail in found if detail is not None)


def takes_kinds(kinds: tuple[SchemeKind, ...], sentence: str, detail: str) -> Rule:
    """Make the rule that a scheme must be of one of these kinds.

    Args:
        kinds: that the backend takes.
        sentence: shown to the user as the rule.
        detail: what is said of a scheme of another kind, behind its name.
    """

    def takes_kind(model: QdqModel, target: Target) -> str | None:
        return None if model.scheme.kind in kinds else f"scheme {model.scheme.name} {detail}"

    takes_kind.__doc__ = sentence
    return takes_kind


@runtime_checkable
class TimesItself(Protocol):
    """A session that runs in a child process, and measures time and memory there."""

    def milliseconds(self, feeds: AnyFeeds, runs: int, warmup: int) -> list[float]:
        """Give the wall time of each run, after `warmup` runs that are not timed."""
        ...

    def peak_memory_bytes(self) -> int:
        """Give the peak resident memory of the child process."""
        ...


@dataclass(frozen=True)
class Setting:
    """Hold a session with other runtime settings than the target's, or the reason why this machine has none."""

    name: str
    ran_on: RunKind
    session: Session | None
    reason: str | None


@runtime_checkable
class HasOtherSettings(Protocol):
    """A backend whose artifacts are measured with other runtime settings, too (e.g. in bf16)."""

    def other_settings(self, artifact: Artifact, bundle: Path, target: Target) -> Iterator[Setting]:
        """Give a session, or a reason for none, for each other setting."""
        ...


@runtime_checkable
class HasClientSettings(Protocol):
    """A backend whose artifacts give other vectors in libraries that do not pass the target's runtime settings."""

    def client_settings(self, target: Target) -> Mapping[str, object]:
        """Give the `model_args` with which sentence-transformers opens an artifact as it was validated."""
        ...


@runtime_checkable
class NeedsEnvironments(Protocol):
    """A backend with tools whose pins conflict with edgeq's: they live in virtual environments of their own."""

    def environments(self) -> tuple[Environment, ...]:
        """List the environments with their pinned packages."""
        ...


@runtime_checkable
class NeedsDevice(Protocol):
    """A backend with targets that need a device beside the CPU, such as an NPU with its driver."""

    def obstacle(self, target: Target) -> str | None:
        """Give the reason why this machine cannot run the target's artifacts, or None."""
        ...


def reads_tokens(model: QdqModel, target: Target) -> str | None:
    """The model must read tokens: these files take texts. For images use ONNX Runtime or OpenVINO on a CPU."""
    return f"the model reads {', '.join(model.inputs)}" if PIXELS in model.inputs else None


def obstacle(backend: Backend, target: Target) -> str | None:
    """Give the reason why this machine's devices cannot run the target's artifacts, or None.

    The CPU is compared elsewhere: `edgeq.system.host.meets`.
    """
    return backend.obstacle(target) if isinstance(backend, NeedsDevice) else None


class Backend(Protocol):
    """Lower a QDQ model to a runtime's files, and run them; a module satisfies this protocol."""

    def tools(self) -> Mapping[str, str]:
        """Give the version of each tool of the backend, or raise ToolMissing with the install command."""
        ...

    def rejections(self, model: QdqModel, target: Target) -> tuple[Rejection, ...]:
        """List every rule that the model or the target does not meet; runs no SDK."""
        ...

    def lower(self, model: QdqModel, target: Target, out_dir: Path) -> Artifact:
        """Write the artifact's files below `out_dir`, and read from them which products the runtime makes integer."""
        ...

    def load(self, artifact: Artifact, bundle: Path, target: Target, threads: int = 0) -> Session:
        """Load the artifact in its runtime; 0 `threads` take the target's number."""
        ...
