"""Lower a QDQ model to an OpenVINO IR, and read from the execution graph which products are integer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgeq.backends.contract import Rejection, Rule, Setting, reads_tokens, rejected, takes_kinds
from edgeq.backends.openvino.ir import read_ir
from edgeq.data.batches import PIXELS
from edgeq.data.sessions import Session
from edgeq.data.tokens import bucket_lengths
from edgeq.errors import ConfigError, DeviceUnavailable, LoweringFailed, ToolMissing
from edgeq.records import Artifact, Placement, QdqModel, Target
from edgeq.system.files import file_ref, storage_errors, write_bytes
from edgeq.system.host import run_kind

_STATIC_DEVICES = frozenset({"NPU"})
_CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("CPU", "NPU"),
    "inference_precision_hint": ("f32", "bf16", "f16"),
    "also_inference_precision_hint": ("f32", "bf16", "f16"),
    "performance_hint": ("LATENCY", "THROUGHPUT"),
}
_CPU_SETTINGS = {
    *_CHOICES, "dynamic_quantization_group_size", "inference_num_threads", "num_streams",
}  # fmt: skip
_CAPABILITIES = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}  # precision hint -> name of the CPU's capability
_SETTINGS = {"CPU": _CPU_SETTINGS, "NPU": {"device", "performance_hint"}}


def is_known_device(model: QdqModel, target: Target) -> str | None:
    """The target's [runtime] names a device: "CPU" or "NPU"."""
    device = target.runtime.get("device")
    return None if device in _CHOICES["device"] else f"device is {device!r}"


def has_known_settings(model: QdqModel, target: Target) -> str | None:
    """The target's [runtime] holds what its device takes, each with a known value."""
    runtime = target.runtime
    unknown = set(runtime) ^ _SETTINGS.get(str(runtime.get("device")), set(runtime))
    if unknown:
        return f"missing or unknown: {', '.join(sorted(unknown))}"
    chosen = {key: runtime[key] for key in _CHOICES if key in runtime}
    return "; ".join(f"{key} is {value!r}" for key, value in chosen.items() if value not in _CHOICES[key]) or None


quantises_products_only = takes_kinds(
    ("mixed", "dynamic"),
    "The scheme must leave in float what is no weight product: OpenVINO runs 16-bit activations in float.",
    "leaves nothing float",
)  # fmt: skip


_has_stored_ranges = takes_kinds(("mixed",), "", "finds ranges while it runs")


def has_ranges_that_an_npu_reads(model: QdqModel, target: Target) -> str | None:
    """An NPU takes ranges that the file holds, and is not known to take scales for each token: take w8a8-gemm."""
    return _has_stored_ranges(model, target) if target.runtime.get("device") in _STATIC_DEVICES else None


def has_unsigned_activations(model: QdqModel, target: Target) -> str | None:
    """Activations must be uint8 with a zero point: that is what x86 multiplies by int8 weights."""
    return f"scheme {model.scheme.name} has int8 activations" if model.scheme.activations_signed else None


def has_shapes_of_its_device(model: QdqModel, target: Target) -> str | None:
    """A CPU takes dynamic shapes, so its target has no buckets; an NPU takes static shapes, so it needs some."""
    buckets, is_static = target.buckets_tokens, target.runtime.get("device") in _STATIC_DEVICES
    is_right = len(set(buckets)) == len(buckets) and min(buckets, default=0) >= 2 if is_static else not buckets
    return None if is_right else f"buckets_tokens is {list(buckets)}"


def is_static_for_texts_only(model: QdqModel, target: Target) -> str | None:
    """A target with buckets takes texts: they are lengths in tokens. For images take a target for a CPU."""
    return reads_tokens(model, target) if target.buckets_tokens else None


def has_names_without_commas(model: QdqModel, target: Target) -> str | None:
    """Names of products hold no comma: OpenVINO lists the names of what it fused between commas."""
    found = [name for name in model.integer_matmuls if "," in name]
    return f"product {found[0]!r}" if found else None


RULES: tuple[Rule, ...] = (
    is_known_device, has_known_settings, quantises_products_only, has_ranges_that_an_npu_reads,
    has_unsigned_activations, has_shapes_of_its_device, is_static_for_texts_only, has_names_without_commas,
)  # fmt: skip


def tools() -> Mapping[str, str]:
    """Give OpenVINO's version.

    Raises:
        ToolMissing: it is not installed.
    """
    try:
        return {"openvino": version("openvino")}
    except PackageNotFoundError as error:
        raise ToolMissing('openvino is not installed; pip install "edgeq[openvino]"') from error


def obstacle(target: Target) -> str | None:
    """Give the reason why OpenVINO finds no such device here, or None.

    Raises:
        ToolMissing: OpenVINO is not installed.
    """
    tools()
    device = str(target.runtime["device"])
    if device == "CPU":
        return None
    import openvino as ov

    found = ov.Core().available_devices
    if any(name.partition(".")[0] == device for name in found):
        return None
    return f"OpenVINO finds no {device} with a driver on this machine (it finds {', '.join(found)})"


def rejections(model: QdqModel, target: Target) -> tuple[Rejection, ...]:
    """List every rule that the model or the target does not meet."""
    return rejected(RULES, model, target)


def refused_operator(path: Path) -> str | None:
    """Compile a float model for the CPU, and give OpenVINO's reason why it cannot run it, or None.

    OpenVINO reads operators that its CPU plugin has no kernel for, and says so when it compiles.

    Raises:
        ToolMissing: OpenVINO is not installed.
    """
    tools()
    from edgeq.backends.openvino.lowering import compiling_error

    return compiling_error(path)


def lower(model: QdqModel, target: Target, out_dir: Path) -> Artifact:
    """Write the IR below `out_dir`: one with dynamic shapes for a CPU; for an NPU one per bucket, with a shared .bin.

    Args:
        model: the QDQ model.
        target: whose device and runtime settings are used.
        out_dir: an existing folder.

    Returns:
        The artifact. Its placement is read from the CPU plugin's execution graph; for an NPU, whose compiler is in the
        driver, from the IR itself.

    Raises:
        ToolMissing: OpenVINO is not installed.
        LoweringFailed: OpenVINO refuses the model.
        StorageFailed: a file cannot be written.
    """
    tools()
    from edgeq.backends.openvino.lowering import BUCKET, STEM, read_qdq, serialized, static

    buckets = bucket_lengths(target.buckets_tokens, model.max_sequence)
    whole = read_qdq(Path(model.file.path), has_dynamic_keys=not buckets and model.inputs != (PIXELS,))
    forms = {BUCKET.format(tokens): static(whole, tokens) for tokens in reversed(buckets)} or {"": whole}
    contents = {suffix: serialized(form) for suffix, form in forms.items()}
    weights = {content[1] for content in contents.values()}
    if len(weights) > 1:
        raise LoweringFailed(f"{target.name}: buckets differ in their weights; please report the model.")
    files = {f"{STEM}{suffix}.xml": content[0] for suffix, content in contents.items()}
    files[_weights(bool(buckets))] = weights.pop()
    with storage_errors(f"writing {STEM}"):
        (out_dir / STEM).parent.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_bytes(out_dir / name, content)
    return Artifact(
        backend=target.backend,
        target=target.name,
        files=tuple(file_ref(out_dir / name, relative_to=out_dir) for name in files),
        qdq_sha256=model.file.sha256,
        placement=_placement(out_dir, list(files), model, target),
        tools=dict(tools()),
    )


def _weights(is_static: bool) -> str:
    from edgeq.backends.openvino.lowering import STEM

    return f"{STEM}_seq.bin" if is_static else f"{STEM}.bin"


def _placement(folder: Path, names: list[str], model: QdqModel, target: Target) -> Placement:
    """Read the placement from the CPU plugin's execution graph, or for another device from the IR."""
    from edgeq.backends.openvino import placement
    from edgeq.backends.openvino.sessions import compiled, properties

    if target.runtime["device"] != "CPU":
        return placement.structural(read_ir(folder / names[0]), model)
    try:
        loaded = compiled(folder / names[0], folder / names[-1], "CPU", properties(target))
    except ConfigError as error:
        raise LoweringFailed(str(error)) from error
    return placement.executed(loaded, model)


def load(artifact: Artifact, bundle: Path, target: Target, threads: int = 0) -> Session:
    """Load the artifact in OpenVINO.

    Args:
        artifact: the result of `lower`.
        bundle: the folder that its paths are relative to.
        target: device and runtime settings.
        threads: 0 takes the target's number.

    Raises:
        ToolMissing: OpenVINO is not installed.
        ConfigError: OpenVINO cannot load the files.
        DeviceUnavailable: this machine lacks the target's device or its driver.
    """
    missing = obstacle(target)
    if missing is not None:
        raise DeviceUnavailable(f"{target.name}: {missing}. Run it on a machine that has one, with Intel's driver.")
    from edgeq.backends.openvino.sessions import properties

    is_cpu = target.runtime["device"] == "CPU"
    return _session(artifact, bundle, str(target.runtime["device"]), properties(target, threads if is_cpu else 0))


def _session(artifact: Artifact, bundle: Path, device: str, told: Mapping[str, str | int | bool]) -> Session:
    from edgeq.backends.openvino.lowering import BUCKET, STEM
    from edgeq.backends.openvino.sessions import BucketSession, OpenvinoSession, compiled

    *networks, weights = [bundle / file.path for file in artifact.files]
    loaded = {xml: OpenvinoSession(xml, compiled(xml, weights, device, told)) for xml in networks}
    if len(loaded) == 1 and networks[0] == bundle / f"{STEM}.xml":
        return loaded[networks[0]]
    prefix = Path(STEM + BUCKET.format("")).name
    return BucketSession({int(xml.stem.removeprefix(prefix)): session for xml, session in loaded.items()})


def client_settings(target: Target) -> Mapping[str, object]:
    """Give the `model_args` of sentence-transformers: `ov_config` with the inference precision.

    Without it OpenVINO computes in bf16 where the CPU has it, and a hint in an IR's `rt_info` is ignored (OpenVINO
    2026.4.1). Dynamic quantisation is off in the IR itself; threads and streams are left to the caller.
    """
    hint = target.runtime.get("inference_precision_hint")  # an NPU has none
    return {} if hint is None else {"ov_config": {"INFERENCE_PRECISION_HINT": hint}}


def other_settings(artifact: Artifact, bundle: Path, target: Target) -> Iterator[Setting]:
    """Give sessions with other settings: another inference precision on a CPU, or the CPU instead of an NPU."""
    from edgeq.backends.openvino.sessions import properties

    if target.runtime["device"] != "CPU":
        exact: dict[str, str | int | bool] = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        session = _session(artifact, bundle, "CPU", exact)
        yield Setting("OpenVINO's CPU plugin, f32", "host-kernels", session, None)
        return
    import openvino as ov

    hint = str(target.runtime["also_inference_precision_hint"])
    name, found = f"inference_precision_hint={hint}", ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if _CAPABILITIES[hint] not in found:
        reason = f"this CPU has no {hint} (OpenVINO finds {', '.join(found)})"
        yield Setting(name, "not-run", None, reason)
        return
    told = properties(target) | {"INFERENCE_PRECISION_HINT": hint}
    yield Setting(name, run_kind(target.runs_on), _session(artifact, bundle, "CPU", told), None)
