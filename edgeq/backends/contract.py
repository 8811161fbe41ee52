"""Define what a backend is: one module with four functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import onnx_ir as ir

from edgeq.data.batches import PIXELS, AnyFeeds
from edgeq.data.sessions import Session
from edgeq.graph import external_data
from edgeq.records import Artifact, Place, QdqModel, SchemeKind, Target
from edgeq.system.environments import Environment


@dataclass(frozen=True)
class Rejection:
    """Say which rule a model or target does not meet, and the offending detail."""

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


Rule = Callable[[QdqModel, Target], str | None]  # its docstring is the sentence shown; it gives the offending detail


def has_buckets(model: QdqModel, target: Target) -> str | None:
    """The runtime takes static shapes: the target needs sequence lengths of at least 2 tokens, each once."""
    buckets = target.buckets_tokens
    is_right = buckets and len(set(buckets)) == len(buckets) and min(buckets) >= 2
    return None if is_right else f"buckets_tokens is {list(buckets)}"


def fits_one_file(model: QdqModel, target: Target) -> str | None:
    """The integer model must be below 2 GB, which is about 8 GB in FP32."""
    is_float = model.file.sha256 == model.float_model_sha256  # asked before quantising
    size = 0 if is_float else external_data.file_size_bytes(Path(model.file.path))
    return f"{size / 1e9:.1f} GB" if size > external_data.LARGE_BYTES else None


def rejected(rules: Iterable[Rule], model: QdqModel, target: Target) -> tuple[Rejection, ...]:
    """Hold a model and a target against every rule, and the one of all runtimes."""
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
    """A session whose runtime lives in another process, where its time and memory are measured."""

    def milliseconds(self, feeds: AnyFeeds, runs: int, warmup: int) -> list[float]:
        """Give the time of each run."""
        ...

    def peak_memory_bytes(self) -> int:
        """Give the peak resident memory of that process."""
        ...


@dataclass(frozen=True)
class Setting:
    """Hold another way to run an artifact on this machine: a session, or the reason why there is none."""

    name: str
    ran_on: Place
    session: Session | None
    reason: str | None


@runtime_checkable
class HasOtherSettings(Protocol):
    """A backend whose artifacts are measured under more than the target's own settings."""

    def other_settings(self, artifact: Artifact, bundle: Path, target: Target) -> Iterator[Setting]:
        """Give each other way to run the artifact here."""
        ...


@runtime_checkable
class NeedsEnvironments(Protocol):
    """A backend some of whose tools live in environments of their own."""

    def environments(self) -> tuple[Environment, ...]:
        """Give each environment, with its pins."""
        ...


@runtime_checkable
class NeedsDevice(Protocol):
    """A backend some of whose targets need a device that a machine may lack, whatever its CPU."""

    def obstacle(self, target: Target) -> str | None:
        """Say why this machine cannot run the target's artifacts, or None."""
        ...


def reads_tokens(model: QdqModel, target: Target) -> str | None:
    """The model must read tokens: these files take texts. For images use ONNX Runtime or OpenVINO on a CPU."""
    return f"the model reads {', '.join(model.inputs)}" if PIXELS in model.inputs else None


def obstacle(backend: Backend, target: Target) -> str | None:
    """Say why this machine cannot run the target's artifacts, or None; what its CPU lacks is `machine.meets`'s."""
    return backend.obstacle(target) if isinstance(backend, NeedsDevice) else None


class Backend(Protocol):
    """Lower a QDQ model for a runtime, and run what came out. A module satisfies it."""

    def tools(self) -> Mapping[str, str]:
        """Give name -> version of what the backend needs, or raise ToolMissing with the install command."""
        ...

    def rejections(self, model: QdqModel, target: Target) -> tuple[Rejection, ...]:
        """List every rule that the model or the target does not meet. Pure; needs no SDK."""
        ...

    def lower(self, model: QdqModel, target: Target, out_dir: Path) -> Artifact:
        """Write the artifact's files below `out_dir` and prove that they run as the scheme says."""
        ...

    def load(self, artifact: Artifact, bundle: Path, target: Target, threads: int = 0) -> Session:
        """Load the artifact in its runtime; `threads` 0 leaves the choice to the target."""
        ...
