"""Lower an integer-only QDQ model for Arm Ethos-U: one .tflite file for each bucket, compiled by Vela.

Only an NPU runs a compiled file. Parity and golden vectors come from the integer .tflite file that Vela compiled; it
runs in LiteRT (`host-kernels`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgeq.backends import tflite
from edgeq.backends.contract import HostStay, Plan, Rejection, Rule, has_buckets, reads_tokens, rejected
from edgeq.backends.ethos_u import rules
from edgeq.data.sessions import Session
from edgeq.data.tokens import bucket_lengths
from edgeq.errors import LoweringFailed, ToolMissing
from edgeq.records import Artifact, Estimate, HostOperator, IntegerSpec, Placement, QdqModel, Target
from edgeq.system.files import file_ref, storage_errors, write_bytes

if TYPE_CHECKING:
    from edgeq.backends.ethos_u.compiler import Compiled, Settings
    from edgeq.backends.tflite import emitter

COMPILED = "ethos_u/model_seq_{}_vela.tflite"
_INTEGER_MODEL = "ethos_u/model.tflite"  # the source of the compiled files, one signature for each
_RUNTIME = "litert"

_ACCELERATORS = (
    "ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256", "ethos-u65-512",
    "ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024", "ethos-u85-2048",
)  # fmt: skip
_SETTINGS = {"accelerator", "system_config", "memory_mode", "arena_kib", "rows"}
_ROWS = ("mul", "depthwise")

_log = logging.getLogger(__name__)


def needs_no_16bit_operators(model: QdqModel, target: Target) -> str | None:
    """The scheme must do without 16-bit products of two tensors, 16-bit GELU and tables, which Ethos-U lacks."""
    spec = model.scheme.spec
    if not isinstance(spec, IntegerSpec):
        return f"scheme {model.scheme.name} leaves tensors in float"
    has = {"products": spec.has_16bit_matmul, "GELU": spec.has_16bit_gelu, "tables": spec.has_16bit_tables}
    found = [name for name, is_there in has.items() if is_there]
    return f"scheme {model.scheme.name} has 16-bit {', '.join(found)}; take w8a8-int-npu" if found else None


def has_known_settings(model: QdqModel, target: Target) -> str | None:
    """The target's [runtime] holds accelerator, system_config, memory_mode, arena_kib and rows, each known."""
    unknown = set(target.runtime) ^ _SETTINGS
    if unknown:
        return f"missing or unknown: {', '.join(sorted(unknown))}"
    wrong = []
    accelerator, config = str(target.runtime["accelerator"]), str(target.runtime["system_config"])
    if accelerator not in _ACCELERATORS:
        wrong.append(f"accelerator is {accelerator!r}; known are {', '.join(_ACCELERATORS)}")
    family = accelerator.rpartition("-")[0].replace("ethos-u", "Ethos_U")
    if not config.startswith(f"{family}_"):
        wrong.append(f"system_config is {config!r}, which is no {family}'s: Vela would take its clock without a word")
    if not isinstance(target.runtime["arena_kib"], int) or int(target.runtime["arena_kib"]) < 1:
        wrong.append(f"arena_kib is {target.runtime['arena_kib']!r}")
    if target.runtime["rows"] not in _ROWS:
        wrong.append(f"rows is {target.runtime['rows']!r}; known are {', '.join(_ROWS)}")
    return "; ".join(wrong) or None


RULES: tuple[Rule, ...] = (reads_tokens, needs_no_16bit_operators, has_buckets, has_known_settings)


def tools() -> Mapping[str, str]:
    """Give the versions of the .tflite writer, Vela and LiteRT.

    Raises:
        ToolMissing: one is not installed.
    """
    try:
        return {name: version(name) for name in ("ai-edge-litert", "ethos-u-vela", "flatbuffers")}
    except PackageNotFoundError as error:
        raise ToolMissing(f'{error.name} is not installed; pip install "edgeq[ethos-u]"') from error


def rejections(model: QdqModel, target: Target) -> tuple[Rejection, ...]:
    """List every rule that the model or the target does not meet."""
    return rejected(RULES, model, target)


def planned(model: ir.Model, bucket: int, target: Target) -> Plan:
    """Write the integer file of one sequence length in memory, and say which of its operators stay on the host."""
    operators, plan = tflite.plan_of(model, bucket, _settings_of(target), _RUNTIME)
    product = rules.product_of(str(target.runtime["accelerator"]))
    whys = [(item, rules.on_host(item.name, item.dtypes[-1], product)) for item in operators]
    return replace(plan, on_host=tuple(HostStay(item.name, item.output, why) for item, why in whys if why is not None))


def _settings_of(target: Target) -> emitter.Settings:
    """Give how the integer file is written: as Vela takes it.

    Raises:
        ToolMissing: ai-edge-litert is not installed.
    """
    tflite.tools()
    from edgeq.backends.tflite import emitter

    return emitter.Settings(32, "quantize", "none", str(target.runtime["rows"]))


def lower(model: QdqModel, target: Target, out_dir: Path) -> Artifact:
    """Write `ethos_u/model_seq_N_vela.tflite` for each bucket N below `out_dir`, and their integer source file.

    Args:
        model: the integer-only QDQ model.
        target: whose buckets and accelerator are used.
        out_dir: an existing folder.

    Returns:
        The artifact; its placement counts the operators of the longest bucket, and names those left to the host and
        the compiler's estimate for each bucket.

    Raises:
        ToolMissing: ai-edge-litert or Vela is not installed.
        ConfigError: Vela knows no such system configuration or memory mode.
        UnsupportedRange: the scales of a calibration leave what a kernel takes; other texts may not.
        LoweringFailed: an operator has no TFLite form, Vela fails, or a bucket does not fit into the memory.
        TimedOut: Vela does not end.
        StorageFailed: a file cannot be written.
    """
    tools()
    from edgeq.backends.ethos_u.compiler import Settings

    written = _settings_of(target)
    chosen = Settings(
        str(target.runtime["accelerator"]), str(target.runtime["system_config"]), str(target.runtime["memory_mode"]),
        int(target.runtime["arena_kib"]),
    )  # fmt: skip
    buckets = sorted(bucket_lengths(target.buckets_tokens, model.max_sequence), reverse=True)
    made = []
    for bucket in buckets:
        # One signature in a file: Vela stores the weights again for each.
        source, _ = tflite.integer_file(model, target.name, (bucket,), written, _RUNTIME)
        made.append(_compiled(source, f"{target.name}: bucket {bucket}", COMPILED.format(bucket), chosen, out_dir))
    data, _ = tflite.integer_file(model, target.name, buckets, written, _RUNTIME)
    whole = _write(out_dir / _INTEGER_MODEL, data)
    return Artifact(
        backend=target.backend,
        target=target.name,
        files=tuple(file_ref(path, relative_to=out_dir) for path in (*(item.path for item in made), whole)),
        qdq_sha256=model.file.sha256,
        placement=Placement(
            integer_matmuls=len(model.integer_matmuls), float_by_scheme=(), float_fallbacks=(),
            operators=made[0].operators, host_operators=tuple(one for item in made for one in item.on_host),
            estimates=tuple(item.estimate for item in made),
            surprises=tuple(one for item in made for one in item.surprises),
        ),
        tools=dict(tools()),
    )  # fmt: skip


@dataclass(frozen=True)
class _Bucket:
    """Hold the compiled file of one bucket, and where each of its operators runs."""

    path: Path
    estimate: Estimate
    operators: dict[str, int]
    on_host: tuple[HostOperator, ...]
    surprises: tuple[str, ...]


def _compiled(source: bytes, where: str, name: str, settings: Settings, out_dir: Path) -> _Bucket:
    """Compile a file of one signature, compare it with the target's NPU and memory, and write it below `out_dir`."""
    from edgeq.backends.ethos_u import compiled_file, compiler

    compiled = compiler.compile_file(source, where, settings)
    inside = compiled_file.read(compiled.data, source, where)
    if inside.accelerator != settings.accelerator:
        raise LoweringFailed(f"{where}: the commands are for {inside.accelerator}, not {settings.accelerator}")
    estimate = _estimate(compiled, name, settings)
    _require_memory(estimate, where)
    counts = Counter(inside.on_npu) + Counter(kind for kind, _ in inside.on_host)
    return _Bucket(
        path=_write(out_dir / name, compiled.data),
        estimate=estimate,
        operators=dict(sorted(counts.items())),
        on_host=tuple(
            HostOperator(file=name, operator=kind, output=output, reason=_reason(compiled, output))
            for kind, output in inside.on_host
        ),
        surprises=tuple(_surprises(source, inside.on_host, settings.accelerator, name)),
    )


def load(artifact: Artifact, bundle: Path, target: Target, threads: int = 0) -> Session:
    """Load the integer source file of the compiled files in LiteRT.

    Args:
        artifact: what `lower` gave.
        bundle: the folder that its paths are relative to.
        target: whose artifact it is.
        threads: 0 takes one.

    Raises:
        ToolMissing: ai-edge-litert is not installed.
        LoweringFailed: LiteRT refuses the file, or dies of it.
    """
    tflite.tools()
    return tflite.open_session(bundle / _INTEGER_MODEL, _RUNTIME, threads or 1)


def _write(path: Path, data: bytes) -> Path:
    with storage_errors(f"writing {path.name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    return path


def _surprises(source: bytes, on_host: Sequence[tuple[str, str]], accelerator: str, name: str) -> list[str]:
    """Compare the side (host or NPU) that `rules` expects for each operator with Vela's placement."""
    from edgeq.backends.tflite import kernels

    product = rules.product_of(accelerator)
    written = {item.output: item for item in kernels.read(source).operators}
    expected = {o for o, item in written.items() if rules.on_host(item.name, item.dtypes[-1], product) is not None}
    real = {output for _, output in on_host}
    found = [f"{name}: {written[o].name} ({o}) was expected on the host; Vela took it" for o in sorted(expected - real)]
    kinds = {output: kind for kind, output in on_host}
    found += [f"{name}: {kinds[o]} ({o}) was expected on the NPU; Vela left it" for o in sorted(real - expected)]
    for sentence in found:
        _log.warning("%s", sentence)
    return found


def _reason(compiled: Compiled, output: str) -> str:
    """Give Vela's reason for leaving an operator to the host; it prints none for operators that it moves itself."""
    return compiled.reasons.get(output, "Vela gives none")


def _estimate(compiled: Compiled, name: str, settings: Settings) -> Estimate:
    """Read cycles, time and memory from Vela's summary."""
    from edgeq.backends.ethos_u.compiler import number

    kib = {
        kind: number(compiled, f"{kind}_memory_used") for kind in ("sram", "dram", "on_chip_flash", "off_chip_flash")
    }
    moved = sum(number(compiled, f"{kind}_total_bytes") for kind in kib)
    return Estimate(
        file=name, accelerator=settings.accelerator, system_config=settings.system_config,
        memory_mode=settings.memory_mode, clock_hz=int(number(compiled, "core_clock")),
        arena_bytes=settings.arena_kib * 1024, cycles=int(number(compiled, "cycles_total")),
        estimated_ms=number(compiled, "inference_time") * 1e3, sram_bytes=int(kib["sram"] * 1024),
        dram_bytes=int(kib["dram"] * 1024), flash_bytes=int((kib["on_chip_flash"] + kib["off_chip_flash"]) * 1024),
        moved_bytes=int(moved),
    )  # fmt: skip


def _require_memory(estimate: Estimate, where: str) -> None:
    """Compare the SRAM that a file needs with the target's: Vela exceeds the given size without an error.

    Raises:
        LoweringFailed: it needs more.
    """
    if estimate.sram_bytes > estimate.arena_bytes:
        raise LoweringFailed(
            f"{where}: needs {estimate.sram_bytes // 1024} KiB of SRAM; the target has {estimate.arena_bytes // 1024} "
            "(runtime.arena_kib). Take shorter buckets, or a memory_mode that keeps the arena in DRAM."
        )
