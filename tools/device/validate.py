#!/usr/bin/env python3
"""Validate an edgeq bundle on the machine that will run it: `python3 validate.py [BUNDLE]`.

One file for Python 3.8 and newer that needs numpy and the one runtime the bundle asks for, and nothing of edgeq. It
checks SHA256SUMS, runs the golden inputs through the artifact, compares the vectors with FP32's and with those of the
machine that exported the bundle, judges them by the target's gate, measures latency, memory and load time, and writes
one `device-report.json`. `--beside OTHER` also times it and another bundle by turns, and says which is faster. The same
file is `tools/device/validate.py` in edgeq and `validate.py` in each bundle.

Outside: a bare-metal Ethos-U, which has no Python. Its integer file runs in LiteRT; validate that with edgeq.

Exit codes: 0 passed, 2 a wrong argument, 3 the runtime is missing (with the command that installs it), 4 this CPU or
form of bundle is not meant to run here, 5 the runtime refuses the artifact, 6 parity failed, 7 the bundle is damaged,
8 the disk, 9 the accelerator is not here. stdout is the result, stderr the progress.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIG, MISSING, UNSUPPORTED, REFUSED, PARITY, CORRUPT, STORAGE, ABSENT = 2, 3, 4, 5, 6, 7, 8, 9
SUMS, MANIFEST, VECTORS, TEXTS = "SHA256SUMS", "manifest.json", "golden.npz", "golden.jsonl"
PREPROCESSING = "preprocessor_config.json"
REPORT = "device-report.json"
AGAIN = "Fetch or export the bundle again."
TRANSPORTS = ("by-hand", "local", "ssh", "adb", "arm64")

# What is read whole is bounded first: a bundle comes from elsewhere.
MOST_SUMS_BYTES, MOST_JSON_BYTES, MOST_GOLDEN_BYTES = 4_000_000, 16_000_000, 512_000_000
MOST_FILES = 10_000
LINE = re.compile(r"([0-9a-f]{64})  ([^\\\n\r]+)")

INVARIANCE_TEXTS, SLOW_INVARIANCE_TEXTS = 8, 3
SEQUENCES = (16, 32, 128)  # tokens that latency is measured at where shapes are dynamic
TURN_LIMIT_S = 600.0  # for loading beside another bundle, and for each turn
FEWEST_RUNS, CELL_SECONDS = 10, 3.0  # a shape's runs end early after so many seconds, but never before so many runs

# numpy's name of a CPU feature -> the kernel's: numpy asks the CPU itself, the kernel may be another machine's.
FLAGS = {
    "AVX2": "avx2", "FMA3": "fma", "AVX512F": "avx512f", "AVX512BW": "avx512bw", "AVX512VL": "avx512vl",
    "AVX512VNNI": "avx512_vnni", "ASIMD": "asimd", "ASIMDDP": "asimddp", "SVE": "sve",
}  # fmt: skip
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


class Stop(Exception):
    """End with an exit code and a message for the user."""

    def __init__(self, exit_code, message):
        """Take both."""
        super().__init__(message)
        self.exit_code = exit_code


def corrupt(path, problem):
    """Say that a file of the bundle is damaged."""
    return Stop(CORRUPT, f"{path}: {problem}. {AGAIN}")


class Progress:
    """Tell on stderr how far it is, a few lines a second at most: they may travel over a slow line."""

    def __init__(self):
        """Begin."""
        self._stage, self._at = "", 0.0

    def __call__(self, stage, done, total):
        """Say that so many of so many are done."""
        now = time.monotonic()
        if stage == self._stage and done < total and now - self._at < 0.5:
            return
        self._stage, self._at = stage, now
        print(f"[validate] {stage} {done}/{total}", file=sys.stderr, flush=True)


# --- the bundle ---------------------------------------------------------------------------------------------------


def read_bounded(path, most):
    """Read a file that must not be larger than so many bytes."""
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise corrupt(path, f"cannot be read ({error.strerror})") from error
    if len(content) > most:
        raise corrupt(path, f"is larger than {most} bytes")
    return content


def is_confined(name):
    """Tell whether a name of SHA256SUMS stays inside the bundle."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and ":" not in parts[0] and "\0" not in name


def read_sums(bundle):
    """Give the sum of each file of the bundle by its name."""
    path = bundle / SUMS
    try:
        lines = read_bounded(path, MOST_SUMS_BYTES).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise corrupt(path, f"is not UTF-8 ({error})") from error
    if lines.pop() != "" or len(lines) > MOST_FILES:
        raise corrupt(path, f"its last line does not end, or it has more than {MOST_FILES} lines")
    sums = {}
    for number, line in enumerate(lines, start=1):
        match = LINE.fullmatch(line)
        if match is None or match[2] in sums or not is_confined(match[2]):
            raise corrupt(path, f"line {number} is damaged: {line[:100]!r}")
        sums[match[2]] = match[1]
    return sums


def bundle_files(bundle):
    """List the files of the bundle by name; a link or a device is refused, because a bundle holds none."""
    found = set()
    for folder, folders, files in os.walk(str(bundle)):
        for name in folders + files:
            path = Path(folder) / name
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise corrupt(path, "is a link or no file")
        found.update((Path(folder) / name).relative_to(bundle).as_posix() for name in files)
        if len(found) > MOST_FILES + 1:
            raise corrupt(bundle, f"holds more than {MOST_FILES} files")
    return found - {SUMS}


def sha256_file(path):
    """Hash a file in pieces."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for piece in iter(lambda: file.read(1 << 20), b""):
                digest.update(piece)
    except OSError as error:
        raise corrupt(path, f"cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def check_sums(bundle, progress):
    """Hash every file of the bundle; give the sums by name."""
    listed, found = read_sums(bundle), bundle_files(bundle)
    problems = [f"{name}: is listed in {SUMS} but not there" for name in sorted(set(listed) - found)]
    problems += [f"{name}: is there but not listed in {SUMS}" for name in sorted(found - set(listed))]
    for done, name in enumerate(sorted(found & set(listed))):
        progress("hash", done, len(listed))
        digest = sha256_file(bundle / name)
        if digest != listed[name]:
            problems.append(f"{name}: its sha256 is {digest}; {SUMS} says {listed[name]}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise corrupt(bundle, "; ".join(problems[:5]) + more)
    return listed


def read_json(path):
    """Read a JSON object without NaN, from a file of bounded size."""

    def refuse(word):
        raise ValueError(f"{word} is no number")

    try:
        found = json.loads(read_bounded(path, MOST_JSON_BYTES).decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"is no JSON that can be read ({str(error)[:200]})") from error
    if not isinstance(found, dict):
        raise corrupt(path, "is no JSON object")
    return found


class Manifest:
    """Hold what a run needs of `manifest.json`, each value of the type it must have."""

    def __init__(self, bundle, sums):
        """Read it and hold its artifact's files against SHA256SUMS."""
        self._path = bundle / MANIFEST
        if MANIFEST not in sums:
            raise corrupt(bundle, f"{MANIFEST} is not there")
        self.sha256 = sums[MANIFEST]
        self._content = read_json(self._path)
        self.target = self.value("target.name", str)
        self.backend = self.value("target.backend", str)
        self.runtime = self.value("target.runtime", dict)
        self.machine = self.value("target.runs_on.machine", str)
        self.flags_all = self.strings("target.runs_on.cpu_flags_all")
        self.flags_any = self.strings("target.runs_on.cpu_flags_any")
        self.elsewhere = self.value("target.runs_on.elsewhere", str)
        self.gate = self.value("target.gate", dict)
        self.dim = self.value("source.dim", int)
        self.takes_images = self.strings("float_model.inputs") == ("pixel_values",)
        self.max_sequence = self.value("source.max_sequence", int)
        buckets = self.value("target.buckets_tokens", list)
        if not all(type(bucket) is int and 0 < bucket <= 1 << 20 for bucket in buckets):
            raise corrupt(self._path, "target.buckets_tokens holds what is no length")
        self.buckets = tuple(sorted({min(bucket, self.max_sequence) for bucket in buckets}))
        self.limit = max(self.buckets, default=self.max_sequence)
        self.files = tuple(bundle / name for name in self._files(sums))

    def _files(self, sums):
        for number in range(len(self.value("artifact.files", list))):
            name = self.value(f"artifact.files.{number}.path", str)
            if sums.get(name) != self.value(f"artifact.files.{number}.sha256", str):
                raise corrupt(self._path, f"artifact.files names {name[:100]!r}, which {SUMS} does not know so")
            yield name

    def value(self, key, kind):
        """Give the value under a path of keys."""
        found = self._content
        for part in key.split("."):
            try:
                found = found[int(part)] if isinstance(found, list) else found[part]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise corrupt(self._path, f"{key} is missing") from error
        is_right = type(found) in ((int, float) if kind is float else (kind,))
        if not is_right:
            raise corrupt(self._path, f"{key} is {str(found)[:60]!r}; {kind.__name__} is needed")
        return found

    def strings(self, key):
        """Give a tuple of strings."""
        found = self.value(key, list)
        if not all(isinstance(item, str) for item in found):
            raise corrupt(self._path, f"{key} holds what is no string")
        return tuple(found)

    def setting(self, name, kind):
        """Give one of the target's runtime settings."""
        return self.value(f"target.runtime.{name}", kind)

    def limit_of(self, name):
        """Give one limit of the gate."""
        return float(self.value(f"target.gate.{name}", float))


def read_arrays(path):
    """Read the arrays of golden.npz; nothing is unpickled, nothing larger than it says is allocated."""
    try:
        with zipfile.ZipFile(str(path)) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > MOST_GOLDEN_BYTES or len(entries) > 16:
                raise ValueError(f"it holds more than {MOST_GOLDEN_BYTES} bytes, or more than 16 arrays")
            return {entry.filename[: -len(".npy")]: read_array(archive, entry) for entry in entries}
    except (OSError, ValueError, TypeError, EOFError, KeyError, RuntimeError, NotImplementedError, SyntaxError,
            zipfile.BadZipFile) as error:  # fmt: skip
        raise corrupt(path, f"golden vectors cannot be read ({str(error)[:200]})") from error


def read_array(archive, entry):
    """Read one array whose header fits the size of its entry."""
    with archive.open(entry) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{entry.filename} is of another version of .npy")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        size = file.tell() + math.prod(shape) * dtype.itemsize
        if dtype.hasobject or size != entry.file_size:
            raise ValueError(f"{entry.filename} is no array of {dtype}{list(shape)}")
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


class Golden:
    """Hold the golden inputs, one text or image each, and the vectors to compare with."""

    def __init__(self, bundle, manifest):
        """Read them and check that they belong together."""
        path = bundle / VECTORS
        arrays = read_arrays(path)
        needed = {"codes": 4} if manifest.takes_images else {"input_ids": 2, "attention_mask": 2, "pad_id": 0}
        for name, axes in {**needed, "reference": 2}.items():
            if name not in arrays or arrays[name].ndim != axes or arrays[name].dtype.kind not in "iuf":
                raise corrupt(path, f"{name} is missing or of another shape")
        self.reference = arrays["reference"].astype(np.float32)
        host = arrays.get("embeddings")
        self.host = None if host is None else host.astype(np.float32)
        self.names = self._names(bundle / TEXTS, "image" if manifest.takes_images else "text")
        count, dim = self.reference.shape
        if dim != manifest.dim or count < 3 or (host is not None and host.shape != self.reference.shape):
            raise corrupt(path, f"has vectors of shape {self.reference.shape}; at least 3 of {manifest.dim} are needed")
        self.pad_id = 0 if manifest.takes_images else int(arrays["pad_id"])
        self.pixels, self.codes, self.tokens = None, None, []
        if manifest.takes_images:
            self.pixels = pixel_values(arrays["codes"], bundle / PREPROCESSING)
            self.codes = np.ascontiguousarray(arrays["codes"].astype(np.uint8).transpose(0, 2, 3, 1))
        else:
            ids, mask = (arrays[name].astype(np.int64) for name in ("input_ids", "attention_mask"))
            if ids.shape != mask.shape:
                raise corrupt(path, "attention_mask has another shape than input_ids")
            self.tokens = [row[kept == 1] for row, kept in zip(ids, mask)]
            if max(len(row) for row in self.tokens) > manifest.limit:
                raise corrupt(path, f"a golden text has more tokens than the {manifest.limit} that the target takes")
        if {len(self.names), len(self.tokens or self.pixels)} != {count}:
            raise corrupt(path, f"holds {count} vectors of another number of inputs or names")

    @staticmethod
    def _names(path, key):
        """Give the texts, or the images' names."""
        try:
            lines = read_bounded(path, MOST_JSON_BYTES).decode("utf-8").split("\n")
            names = [json.loads(line)[key] for line in lines if line]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise corrupt(path, f"cannot be read ({str(error)[:200]})") from error
        if not all(isinstance(name, str) for name in names):
            raise corrupt(path, f"a golden {key} is no string")
        return names

    def images(self, rows):
        """Give some images, float32[rows, 3, height, width] and as pixels, uint8[rows, height, width, 3]."""
        return {"pixel_values": self.pixels[rows], "pixels": self.codes[rows]}

    def __len__(self):
        """Count them."""
        return len(self.reference)


def pixel_values(codes, path):
    """Rescale and normalise images, float32[images, 3, height, width], as the bundle's preprocessing says."""
    config = read_json(path)
    factor = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale") else 1.0
    is_normalized = bool(config.get("do_normalize"))
    try:
        mean, std = (
            np.array(config[name] if is_normalized else (plain,) * 3, np.float32).reshape(3, 1, 1)
            for name, plain in (("image_mean", 0.0), ("image_std", 1.0))
        )
    except (KeyError, ValueError, TypeError) as error:
        raise corrupt(path, "image_mean and image_std are no three numbers") from error
    return (codes.astype(np.float32) * np.float32(factor) - mean) / std


# --- the machine --------------------------------------------------------------------------------------------------


def machine():
    """Give the instruction set as Linux spells it: x86_64, aarch64."""
    name = platform.machine()
    return MACHINES.get(name.lower(), name)


def cpu_flags():
    """Give the CPU's flags as the Linux kernel spells them."""
    try:
        module = importlib.import_module("numpy._core._multiarray_umath")
    except ImportError:  # numpy 1
        module = importlib.import_module("numpy.core._multiarray_umath")
    features = getattr(module, "__cpu_features__", {})
    known = {flag: bool(features[name]) for name, flag in FLAGS.items() if name in features}
    own = {flag for flag, is_there in known.items() if is_there}
    kernel = set()
    for line in read_text("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            kernel = set(value.split())
            break
    agrees = all((flag in kernel) == there for flag, there in known.items() if flag.startswith(("avx", "asimd")))
    return own | kernel if kernel and agrees else own


def lacks(manifest, accelerator):
    """List what this machine lacks of what the target asks for."""
    if accelerator == manifest.machine:
        return []
    if machine() != manifest.machine:
        return [f"the machine is {accelerator or machine()}, {manifest.machine} is needed"]
    flags = cpu_flags()
    missing = [f"the CPU lacks {flag}" for flag in manifest.flags_all if flag not in flags]
    if manifest.flags_any and not flags & set(manifest.flags_any):
        missing.append(f"the CPU has none of {', '.join(manifest.flags_any)}")
    return missing


def require_cpu(manifest):
    """Refuse a CPU of the target's own kind that lacks flags: its vectors would be wrong."""
    missing = lacks(manifest, None)
    if machine() == manifest.machine and missing:
        raise Stop(
            UNSUPPORTED,
            f"{manifest.target}: {'; '.join(missing)}; without that the vectors would be wrong. Take a bundle for a "
            "target that this CPU meets.",
        )


def read_text(path):
    """Read what the system tells in a file, or nothing."""
    try:
        with Path(path).open("rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return ""


def describe_machine(manifest, accelerator):
    """Describe CPU and system; no host name."""
    model, cpuinfo = platform.processor() or machine(), read_text("/proc/cpuinfo")
    named = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    board = read_text("/proc/device-tree/model").strip("\0 \n")
    memory = re.search(r"^MemTotal:\s+(\d+) kB$", read_text("/proc/meminfo"), re.MULTILINE)
    return {
        "machine": machine(),
        "accelerator": accelerator,
        "cpu": (board or (named[1].strip() if named else model))[:200],
        "cores": os.cpu_count() or 1,
        "cpu_flags": sorted(cpu_flags()),
        "system": f"{platform.system()} {platform.release()}"[:200],
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "lacks": lacks(manifest, accelerator),
    }


def conditions():
    """Read temperatures and clocks where the system tells them."""
    temperatures, clocks = {}, {}
    for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*")):
        found = read_text(zone / "temp").strip()
        if re.fullmatch(r"-?\d{1,7}", found):
            temperatures[f"{zone.name} {read_text(zone / 'type').strip()}".strip()[:80]] = int(found) / 1000
    for core in sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*")):
        found = read_text(core / "cpufreq" / "scaling_cur_freq").strip()
        if re.fullmatch(r"\d{1,9}", found):
            clocks[core.name] = int(found) / 1000
    return {"temperatures_c": temperatures, "frequencies_mhz": clocks}


def peak_memory_bytes():
    """Give this process's peak resident memory, or None where the system does not tell."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", read_text("/proc/self/status"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


# --- runtimes -----------------------------------------------------------------------------------------------------


def imported(name, install):
    """Import a runtime, or say how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = sys.executable or "python3"
        raise Stop(MISSING, f"{name} cannot be imported ({error}); {package} -m pip install {install}") from error


def bucket_of(path):
    """Read the length from a file's name: model_seq_128_ctx.onnx."""
    found = re.search(r"_seq_(\d+)", path.name)
    if found is None:
        raise corrupt(path, "names no length in tokens")
    return int(found[1])


class Runner:
    """Keep a loaded artifact. `buckets` are the lengths it takes, empty where shapes are dynamic."""

    buckets = ()
    accelerator = None  # what a machine is called that has the accelerator which it ran on

    def __call__(self, feeds):
        """Run arrays by input name, each [batch, ...] (one text where there are buckets); give float32[batch, dim]."""
        raise NotImplementedError


class OrtRunner(Runner):
    """Run an ONNX file in ONNX Runtime on the CPU."""

    def __init__(self, manifest, threads, is_own_machine):
        """Load it with the target's settings."""
        ort = imported("onnxruntime", "onnxruntime")
        self.tools = {"onnxruntime": ort.__version__}
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads = threads or manifest.setting("intra_op_threads", int)
        levels = {"all": "ORT_ENABLE_ALL", "extended": "ORT_ENABLE_EXTENDED", "basic": "ORT_ENABLE_BASIC"}
        level = levels.get(manifest.setting("graph_optimization", str), "ORT_ENABLE_ALL")
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        if not is_own_machine:  # exact sums, as on the target's CPU; an x86 CPU without VNNI would saturate them
            options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = ort.InferenceSession(str(manifest.files[0]), options, providers=["CPUExecutionProvider"])
        self._inputs = [item.name for item in self._session.get_inputs()]

    def __call__(self, feeds):
        """Give float32[batch, dim]."""
        given = {name: feeds[name] for name in self._inputs}
        return np.asarray(self._session.run(["sentence_embedding"], given)[0], np.float32)


class QnnRunner(Runner):
    """Run HTP context binaries in ONNX Runtime's QNN plugin: on Hexagon, or in its emulator on a PC."""

    def __init__(self, manifest, threads, is_own_machine):
        """Load one session for each length, on the plugin alone."""
        if manifest.setting("io", str) != "float":
            raise Stop(UNSUPPORTED, f'{manifest.target}: io is "quantized"; this script runs io "float" only.')
        ort = imported("onnxruntime", "onnxruntime onnxruntime-qnn")
        qnn = imported("onnxruntime_qnn", "onnxruntime onnxruntime-qnn")
        self.tools = {"onnxruntime": ort.__version__, "onnxruntime-qnn": str(getattr(qnn, "__version__", "unknown"))}
        provider, self.threads = "QNNExecutionProvider", 0
        ort.register_execution_provider_library(provider, qnn.get_library_path())
        devices = [device for device in ort.get_ep_devices() if device.ep_name == provider]
        if not devices:
            raise Stop(ABSENT, f"{manifest.target}: the QNN plugin finds no device. Update the system's QNN driver.")
        on_npu = [device for device in devices if device.device.type == ort.OrtHardwareDeviceType.NPU]
        is_hexagon = bool(on_npu) and machine() == "aarch64"
        self.accelerator = f"hexagon-v{manifest.setting('htp_arch', int)}" if is_hexagon else None
        self._sessions = {}
        for path in (path for path in manifest.files if path.suffix == ".onnx"):
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            options.add_provider_for_devices((on_npu or devices)[:1], {"backend_path": qnn.get_qnn_htp_path()})
            self._sessions[bucket_of(path)] = ort.InferenceSession(str(path), sess_options=options)
        self.buckets = tuple(sorted(self._sessions))

    def __call__(self, feeds):
        """Give float32[1, dim]."""
        session = self._sessions[feeds["input_ids"].shape[1]]
        given = {item.name: feeds[item.name] for item in session.get_inputs()}
        return np.asarray(session.run(None, given)[0], np.float32)


class TfliteRunner(Runner):
    """Run a .tflite file in LiteRT or tflite-runtime: a signature for each length, 8-bit codes out."""

    def __init__(self, manifest, threads, is_own_machine):
        """Load it in the interpreter that the target names."""
        if manifest.setting("interpreter", str) == "litert":
            module, package = imported("ai_edge_litert.interpreter", "ai-edge-litert"), "ai_edge_litert"
        else:
            module, package = imported("tflite_runtime.interpreter", "tflite-runtime 'numpy<2'"), "tflite_runtime"
        self.tools = {package.replace("_", "-"): str(sys.modules[package].__version__)}
        self.threads = threads or manifest.setting("threads", int)
        self._interpreter = module.Interpreter(model_path=str(manifest.files[0]), num_threads=self.threads or None)
        if manifest.takes_images:
            self._load_image(manifest)
            return
        names = {f"seq_{bucket}": bucket for bucket in manifest.buckets}
        there = [name for name in self._interpreter.get_signature_list() if name in names]
        if len(there) != len(names):
            raise corrupt(manifest.files[0], f"has the signatures {there}; {sorted(names)} are needed")
        self._runners = {names[name]: self._interpreter.get_signature_runner(name) for name in there}
        self.buckets = tuple(sorted(self._runners))
        self._codes = {bucket: self._affine(runner) for bucket, runner in self._runners.items()}

    def _affine(self, runner):
        """Give scale and zero point of the vectors; (1, 0) where they are float."""
        output = runner.get_output_details()["sentence_embedding"]
        scales, zero_points = (output["quantization_parameters"][name] for name in ("scales", "zero_points"))
        return (np.float32(scales[0]), int(zero_points[0])) if len(scales) else (np.float32(1.0), 0)

    def _load_image(self, manifest):
        """Take the one signature of a file that reads pixels, uint8[1, height, width, 3]."""
        there = list(self._interpreter.get_signature_list())
        if there != ["image"]:
            raise corrupt(manifest.files[0], f"has the signatures {there}; image is needed")
        self._runners = {0: self._interpreter.get_signature_runner("image")}
        self._codes = {0: self._affine(self._runners[0])}
        self.buckets = (1,)  # one image at a time

    def __call__(self, feeds):
        """Give float32[1, dim], dequantised."""
        if "pixels" in feeds:
            bucket, given = 0, {"pixels": feeds["pixels"]}
        else:
            bucket = feeds["input_ids"].shape[1]
            given = {name: feeds[name].astype(np.int32) for name in ("input_ids", "attention_mask")}
        codes = self._runners[bucket](**given)["sentence_embedding"]
        scale, zero_point = self._codes[bucket]
        return (codes.astype(np.float32) - zero_point) * scale


class OpenvinoRunner(Runner):
    """Run an IR in OpenVINO: dynamic shapes on a CPU, one file for each length on an NPU."""

    def __init__(self, manifest, threads, is_own_machine):
        """Compile it for the target's device with the target's properties."""
        openvino = imported("openvino", "openvino")
        self.tools = {"openvino": str(openvino.__version__)}
        core, device = openvino.Core(), manifest.setting("device", str)
        if not any(name.partition(".")[0] == device for name in core.available_devices):
            found = ", ".join(core.available_devices)
            raise Stop(ABSENT, f"{manifest.target}: OpenVINO finds no {device} (it finds {found}). Install its driver.")
        told = {key.upper(): value for key, value in manifest.runtime.items() if key not in (
            "device", "also_inference_precision_hint")}  # fmt: skip
        if device == "CPU" and threads:
            told["INFERENCE_NUM_THREADS"] = threads
        self.threads = int(told.get("INFERENCE_NUM_THREADS", 0))
        networks, weights = manifest.files[:-1], manifest.files[-1]
        requests = {}
        for xml in networks:
            compiled = core.compile_model(core.read_model(str(xml), str(weights)), device, told)
            requests[bucket_of(xml) if manifest.buckets else 0] = compiled.create_infer_request()
        self._requests = requests
        self.buckets = tuple(sorted(requests)) if manifest.buckets else ()

    def __call__(self, feeds):
        """Give float32[batch, dim]."""
        request = self._requests[feeds["input_ids"].shape[1] if self.buckets else 0]
        model = request.get_compiled_model()
        request.infer({port.get_any_name(): feeds[port.get_any_name()] for port in model.inputs})
        return np.array(request.get_tensor(model.output("sentence_embedding")).data, np.float32)


class RockchipRunner(Runner):
    """Run .rknn files on Rockchip's NPU through rknn-toolkit-lite2, one for each length."""

    def __init__(self, manifest, threads, is_own_machine):
        """Load them."""
        module = imported("rknnlite.api", "rknn-toolkit-lite2")
        from_package = importlib.import_module("rknnlite")
        self.tools = {"rknn-toolkit-lite2": str(getattr(from_package, "__version__", "unknown"))}
        platform_name, self.threads = manifest.setting("platform", str), 0
        boards = read_text("/proc/device-tree/compatible").split("\0")
        if f"rockchip,{platform_name}" not in boards:
            found = ", ".join(filter(None, boards)) or "no device tree"
            raise Stop(ABSENT, f"{manifest.target}: is for {platform_name}; this is {found}. Run it on a board.")
        self.accelerator, self._networks = platform_name, {}
        for path in (path for path in manifest.files if path.suffix == ".rknn"):
            network = module.RKNNLite()
            if network.load_rknn(str(path)) != 0 or network.init_runtime() != 0:
                raise RuntimeError(f"{path.name}: the NPU's runtime refuses it")
            self._networks[bucket_of(path)] = network
        self.buckets = tuple(sorted(self._networks))

    def __call__(self, feeds):
        """Give float32[1, dim]."""
        network = self._networks[feeds["input_ids"].shape[1]]
        found = network.inference(inputs=[feeds["input_ids"], feeds["attention_mask"]])
        return np.asarray(found[0], np.float32).reshape(1, -1)


RUNNERS = {
    "onnxruntime": OrtRunner, "qnn": QnnRunner, "tflite": TfliteRunner, "openvino": OpenvinoRunner,
    "rockchip": RockchipRunner,
}  # fmt: skip


def load(manifest, threads):
    """Load the artifact in the runtime that the bundle asks for; give it and the milliseconds that took."""
    if manifest.backend not in RUNNERS:
        raise Stop(
            UNSUPPORTED,
            f"{manifest.target}: nothing with Python runs artifacts of {manifest.backend} (a bare-metal NPU); their "
            "integer file runs in LiteRT: use `edgeq verify` or `edgeq validate` on a PC.",
        )
    begin = time.perf_counter_ns()
    try:
        runner = RUNNERS[manifest.backend](manifest, threads, not lacks(manifest, None))
    except Stop:
        raise
    except Exception as error:  # the boundary to foreign code: a runtime may raise anything
        raise Stop(REFUSED, f"{manifest.target}: the runtime refuses the artifact: {str(error)[:500]}") from error
    return runner, (time.perf_counter_ns() - begin) / 1e6


# --- running ------------------------------------------------------------------------------------------------------


def padded(rows, width, pad_id):
    """Pad token ids to a width, int64[rows, width], with the mask and the token types of single texts."""
    ids = np.full((len(rows), width), pad_id, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for position, row in enumerate(rows):
        ids[position, : len(row)], mask[position, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


class Inputs:
    """Feed golden inputs to a runner: one alone, a text in the smallest length that holds it."""

    def __init__(self, golden, runner, limit):
        """Take both."""
        self._golden, self._runner = golden, runner
        self._sizes = runner.buckets or range(1, limit + 1)

    def width(self, size):
        """Give the smallest length that the artifact takes and that holds so many tokens."""
        return next((length for length in self._sizes if length >= size), self._sizes[-1])

    def run(self, rows, width=None):
        """Run golden inputs in one batch (texts padded to a width); give float32[rows, dim]."""
        golden = self._golden
        if golden.pixels is not None:
            found = self._runner(golden.images(list(rows)))
        else:
            texts = [golden.tokens[row] for row in rows]
            size = self.width(max(1, max(len(text) for text in texts)) if width is None else width)
            found = self._runner(padded(texts, size, 0 if self._runner.buckets else golden.pad_id))
        if found.shape != (len(rows), golden.reference.shape[1]):
            raise Stop(
                PARITY,
                f"the artifact gives vectors of shape {list(found.shape)}; {[len(rows), golden.reference.shape[1]]} is "
                "needed",
            )
        return found

    def sample(self, width):
        """Make feeds of one image, or of one text of exactly so many tokens, from the golden ones: for latency."""
        if self._golden.pixels is not None:
            return self._golden.images([0])
        tokens = np.concatenate(self._golden.tokens)
        return padded([np.resize(tokens, width)], width, self._golden.pad_id)


def invariance(inputs, golden, runner, is_slow):
    """Give the smallest cosine between any two vectors of one input: alone, in batches, and at other paddings."""
    count = SLOW_INVARIANCE_TEXTS if is_slow else INVARIANCE_TEXTS
    lengths = [len(row) for row in golden.tokens] or [1] * len(golden)
    order = sorted(range(len(golden)), key=lambda row: (lengths[row], row))
    chosen = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    rows = [order[position] for position in chosen]
    widest = inputs.width(max(lengths[row] for row in rows))
    is_batched = not runner.buckets
    mixed = inputs.run(rows, widest) if is_batched else None
    reverse = inputs.run(rows[::-1], widest)[::-1] if is_batched else None
    smallest = 1.0
    for position, row in enumerate(rows):
        size = max(1, lengths[row])
        asked = (size, size + 1, size + 7, 1 << size.bit_length(), widest) if golden.pixels is None else (1,)
        widths = sorted({inputs.width(width) for width in asked})
        vectors = [inputs.run([row], width)[0] for width in widths]
        if is_batched:
            vectors.extend([*inputs.run([row, row], widths[0]), mixed[position], reverse[position]])
        smallest = min(smallest, smallest_cosine(np.stack(vectors)))
    return smallest


def smallest_cosine(vectors):
    """Give the smallest cosine between any two rows; 0.0 where one is NaN, infinite or zero."""
    if not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
        return 0.0
    rows = unit(vectors)
    return float(min((rows @ rows.T).min(), 1.0))


def run_all(golden, runner, manifest, progress):
    """Run every golden input alone; give float32[count, dim] and the invariance."""
    inputs = Inputs(golden, runner, manifest.limit)
    rows = []
    try:
        for row in range(len(golden)):
            progress("run", row, len(golden))
            rows.append(inputs.run([row])[0])
        progress("run", len(golden), len(golden))
        progress("invariance", 0, 1)
        return np.stack(rows), invariance(inputs, golden, runner, manifest.gate.get("parity_texts") is not None)
    except Stop:
        raise
    except Exception as error:  # the boundary to foreign code: a runtime may raise anything
        raise Stop(REFUSED, f"{manifest.target}: the runtime cannot run the artifact: {str(error)[:500]}") from error


def sizes_of(golden, runner, manifest):
    """List the lengths in tokens that latency is measured at; 1 for images."""
    few = [length for length in SEQUENCES if length <= manifest.limit] or [manifest.limit]
    return [1] if golden.pixels is not None else list(runner.buckets or few)


def latencies(golden, runner, manifest, runs, warmup, progress):
    """Measure one text, or image, at a few sizes."""
    inputs = Inputs(golden, runner, manifest.limit)
    sizes = sizes_of(golden, runner, manifest)
    cells = []
    for done, size in enumerate(sizes):
        progress("latency", done, len(sizes))
        feeds = inputs.sample(size)
        for _ in range(warmup):
            runner(feeds)
        found, began = [], time.monotonic()
        while len(found) < runs and (len(found) < FEWEST_RUNS or time.monotonic() - began < CELL_SECONDS):
            begin = time.perf_counter_ns()
            runner(feeds)
            found.append((time.perf_counter_ns() - begin) / 1e6)
        # The measured run at or above the quantile: never below one that was measured.
        p50, p90, p99 = (sorted(found)[math.ceil(q * (len(found) - 1))] for q in (0.5, 0.9, 0.99))
        latency = {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99}
        cells.append({"batch": 1, "sequence": size, "runs": len(found), "warmup_runs": warmup, "latency": latency})
    progress("latency", len(sizes), len(sizes))
    return cells


# --- paired times: from edgeq/evaluation/paired_times.py by tools/device_script; change them there -------------------

LEVEL = 0.99  # of intervals: a table has a dozen of them, and none should tell a difference by chance
SMALLEST_DIFFERENCE = 1.03  # a margin: two processes of one file differ, too, by their addresses and cores
WIDEST_INTERVAL = 1.25  # high over low; beyond it, the machine was too busy to tell how large a difference is

_TURN_MS, _MOST_RUNS = 20.0, 10

_Name = TypeVar("_Name", bound=str)

FASTER, SLOWER, NOT_TOLD_APART = "faster", "slower", "not told apart"
NOISY = "noisy: repeat on an idle machine"
TOO_FEW = "too few rounds for an interval"


class Interval(NamedTuple):
    """Hold a median of `size` values and its interval; low and high are None where the values are too few for one."""

    size: int
    median: float
    low: float | None
    high: float | None
    level: float


class Turns(NamedTuple):
    """Hold one model's times in milliseconds: the median of each round that counted, and every run of these rounds."""

    rounds_ms: tuple[float, ...]
    runs_ms: tuple[float, ...]


def median_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Compute a median and the sign test's interval for it, which lies between two of the values.

    The interval holds the true median with a probability of at least `level`: rank r from below and from above, for the
    largest r with P(Binomial(n, 1/2) < r) <= (1 - level) / 2.

    Args:
        values: independent, at least one.
        level: of the interval, above 0 and below 1.
    """
    ordered = sorted(values)
    count, rank, outside = len(ordered), 0, 0
    while True:
        outside += math.comb(count, rank)
        if outside > (1.0 - level) / 2.0 * 2**count:
            break
        rank += 1
    low, high = (ordered[rank - 1], ordered[count - rank]) if rank else (None, None)
    return Interval(count, statistics.median(ordered), low, high, level)


def paired_ratios(first_ms: Sequence[float], second_ms: Sequence[float]) -> list[float]:
    """Divide the second's times by the first's, and give the geometric mean over each two rounds, forward and back.

    Args:
        first_ms: of each round.
        second_ms: of the same rounds; a last round without its way back is left out.
    """
    ratios = [second / first for first, second in zip(first_ms, second_ms)]
    return [math.sqrt(forth * back) for forth, back in zip(ratios[::2], ratios[1::2])]


def paired_differences(first_ms: Sequence[float], second_ms: Sequence[float]) -> list[float]:
    """Subtract the first's times from the second's, in milliseconds, and give the mean over each two rounds.

    Args:
        first_ms: of each round.
        second_ms: of the same rounds; a last round without its way back is left out.
    """
    differences = [second - first for first, second in zip(first_ms, second_ms)]
    return [(forth + back) / 2.0 for forth, back in zip(differences[::2], differences[1::2])]


def verdict(found: Interval) -> str:
    """Say in words what an interval of ratios (the other's time over this one's) tells: faster, slower, or nothing."""
    if found.low is None or found.high is None:
        return TOO_FEW
    is_noisy = found.high / found.low > WIDEST_INTERVAL
    if found.low > SMALLEST_DIFFERENCE:
        told = FASTER
    elif found.high < 1.0 / SMALLEST_DIFFERENCE:
        told = SLOWER
    else:
        told = NOT_TOLD_APART
    if not is_noisy:
        return told
    return f"too {NOISY}" if told == NOT_TOLD_APART else f"{told}, {NOISY}"


def order_of(names: Sequence[_Name], round_number: int) -> list[_Name]:
    """Give the order of turns in a round: forward, then back; each pair of rounds begins with another model.

    Who is last in a round is first in the next and finds its caches warm: that advantage, too, must go around.
    """
    start = round_number // 2 % len(names)
    forward = [*names[start:], *names[:start]]
    return forward[::-1] if round_number % 2 else forward


def take_turns(
    players: Mapping[_Name, Callable[[int, int], Sequence[float]]],
    rounds: int,
    warmup_rounds: int,
    failures: tuple[type[Exception], ...] = (),
) -> tuple[dict[_Name, Turns], dict[_Name, Exception]]:
    """Time models that stay loaded by turns: some short runs of each in every round.

    The rounds before those that count also tell how many runs fill a turn. A short turn begins with a run that is not
    timed: the other models have emptied the caches.

    Args:
        players: name -> a function of how many runs are timed, and how many are not and stand before them; it gives
            the milliseconds of each timed run.
        rounds: that count; rounded up to an even number.
        warmup_rounds: before them.
        failures: the errors that put one model out and let the others go on; any other error ends all.

    Returns:
        The times of each model that stayed to the end, and the error of each that did not.
    """
    first_ms: dict[_Name, list[float]] = {name: [] for name in players}
    rounds_ms: dict[_Name, list[float]] = {name: [] for name in players}
    runs_ms: dict[_Name, list[float]] = {name: [] for name in players}
    failed: dict[_Name, Exception] = {}
    last = warmup_rounds + rounds + rounds % 2
    for number in range(-warmup_rounds, last - warmup_rounds):
        for name in order_of(list(players), number):
            if name in failed:
                continue
            runs, untimed = _length_of_turn(first_ms[name]) if number >= 0 else (1, 0)
            try:
                found = [float(value) for value in players[name](runs, untimed)]
            except failures as error:
                failed[name] = error
                continue
            if number < 0:
                first_ms[name] += found
                continue
            rounds_ms[name].append(statistics.median(found))
            runs_ms[name] += found
    done = {name: Turns(tuple(rounds_ms[name]), tuple(runs_ms[name])) for name in players if name not in failed}
    return done, failed


def _length_of_turn(first_ms: Sequence[float]) -> tuple[int, int]:
    """Say how many timed runs make a turn, and how many untimed ones stand before them."""
    if not first_ms:
        return 1, 0
    run_ms = statistics.median(first_ms)
    if run_ms >= _TURN_MS:
        return 1, 0
    return min(_MOST_RUNS, math.ceil(_TURN_MS / max(run_ms, 1e-3))), 1


# --- end of paired times ----------------------------------------------------------------------------------------------


# --- two bundles by turns -----------------------------------------------------------------------------------------


class Served:
    """Keep a bundle loaded in a process of its own, which runs this script with --serve."""

    def __init__(self, bundle, threads):
        """Start the process and wait until the bundle is loaded."""
        self._bundle = bundle
        words = [sys.executable, Path(__file__).resolve(), bundle, "--serve", "--threads", threads]
        self._process = subprocess.Popen(
            [str(word) for word in words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True
        )
        try:
            self.loaded = self._reply()
        except BaseException:
            self.close()
            raise

    def turn(self, size, runs, untimed):
        """Give the milliseconds of each of some runs in a row, after others that are not timed."""
        try:
            self._process.stdin.write(json.dumps({"size": size, "runs": runs, "untimed": untimed}) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it ended: the missing reply says so
        return self._reply()

    def _reply(self):
        """Read one line; no reply ends the script with the process's own exit code."""
        timer = threading.Timer(TURN_LIMIT_S, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        status = self._process.wait()
        how = f"status {status}" if status >= 0 else f"signal {-status}; memory may have run out, or {TURN_LIMIT_S:g} s"
        code = status if status > 1 else REFUSED
        raise Stop(code, f"{self._bundle}: its process ended while it was timed ({how}). What it says stands above.")

    def close(self):
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            try:
                stream.close()
            except OSError:  # unsent bytes
                pass


def serve(bundle, threads):
    """Load a bundle, say what sizes it takes, and time runs as asked on standard input until that ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a runtime prints must not stand among the replies

    def put(reply):
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    manifest = Manifest(bundle, check_sums(bundle, lambda *_: None))
    golden = Golden(bundle, manifest)
    require_cpu(manifest)
    runner, _ = load(manifest, threads)
    ran_on = run_kind(manifest, runner.accelerator, False)
    if ran_on != "device":
        raise Stop(UNSUPPORTED, f"{manifest.target}: runs here on {ran_on}, whose times mean nothing. Name another.")
    inputs = Inputs(golden, runner, manifest.limit)
    put({
        "target": manifest.target, "manifest_sha256": manifest.sha256, "sizes": sizes_of(golden, runner, manifest),
        "takes": [1] if golden.pixels is not None else list(runner.buckets or range(1, manifest.limit + 1)),
    })  # fmt: skip
    for line in sys.stdin:
        request = json.loads(line)
        feeds, found = inputs.sample(request["size"]), []
        for _ in range(request["untimed"]):
            runner(feeds)
        for _ in range(request["runs"]):
            begin = time.perf_counter_ns()
            runner(feeds)
            found.append((time.perf_counter_ns() - begin) / 1e6)
        put(found)


def beside(bundle, other, options, progress):
    """Time a bundle and another by turns at each size that both take; give the median of the paired ratios."""
    served = []
    try:
        for path in (bundle, other):
            served.append(Served(path, options.threads))
        own, its = (item.loaded for item in served)
        sizes = sorted(set(own["takes"]) & set(its["takes"]) & {*own["sizes"], *its["sizes"]})
        if not sizes:
            raise Stop(CONFIG, f"--beside {other}: no length is taken by both: {own['sizes']} and {its['sizes']}.")
        cells = []
        for done, size in enumerate(sizes):
            progress("turns", done, len(sizes))
            players = {
                name: lambda runs, untimed, item=item, size=size: item.turn(size, runs, untimed)
                for name, item in zip(("own", "its"), served)
            }
            times, _ = take_turns(players, options.runs, options.warmup)
            ratio = median_interval(paired_ratios(times["own"].rounds_ms, times["its"].rounds_ms))
            cells.append({
                "sequence": size, "pairs": ratio.size, "median": ratio.median, "low": ratio.low, "high": ratio.high,
                "level": ratio.level, "verdict": verdict(ratio),
            })  # fmt: skip
        progress("turns", len(sizes), len(sizes))
        return {"target": its["target"], "manifest_sha256": its["manifest_sha256"], "cells": cells}
    finally:
        for item in served:
            item.close()


# --- measuring and judging ----------------------------------------------------------------------------------------


def unit(rows):
    """Scale each row to length 1, float64; a zero row stays zero."""
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(norms == 0.0, 1.0, norms)


# --- vector measures: from edgeq/evaluation/vector_measures.py by tools/device_script; change them there ----------

NEIGHBOURS = 10
_UNIT_TOLERANCE = 1e-4
_LEAST_SPREAD = 1e-6  # of unit vectors around their mean: float32 resolves no less
_BLOCK_ROWS = 512
_RANKED_TEXTS = 3000  # 4.5 million pairs; more take gigabytes and do not change the correlation
_RESAMPLES, _BLOCK_RESAMPLES, _SEED = 1000, 100, 0
_QUANTILES = (0.025, 0.975)  # of a 95 % interval


def measured(reference: NDArray[np.float32], vectors: NDArray[np.float32]) -> dict[str, float]:
    """Measure float32[texts, dim] against FP32's vectors of the same texts.

    Both sides need the same shape, finite numbers, at least three texts, and no zero vector in FP32's.

    Returns:
        The figures of `edgeq.records.Measures` that follow from the vectors alone.
    """
    norms, own = (np.linalg.norm(rows.astype(np.float64), axis=1) for rows in (reference, vectors))
    expected, found = unit(reference), unit(vectors)
    cosines = np.clip(np.sum(expected * found, axis=1), -1.0, 1.0)
    centred = centred_cosines(reference, vectors)
    regrets, shared = ranking_losses(expected, found)
    cosine_mean, cosine_low, cosine_high = mean_interval(centred)
    regret_mean, regret_low, regret_high = mean_interval(regrets)
    return {
        "centred_cosine_mean": cosine_mean,
        "centred_cosine_mean_low": cosine_low,
        "centred_cosine_mean_high": cosine_high,
        "centred_cosine_p01": float(np.sort(centred)[(len(centred) - 1) // 100]),
        "centred_cosine_min": float(centred.min()),
        "regret_mean": regret_mean,
        "regret_mean_low": regret_low,
        "regret_mean_high": regret_high,
        "regret_p99": float(np.sort(regrets)[-1 - (len(regrets) - 1) // 100]),
        "spearman": similarity_correlation(expected, found),
        "norm_error_max": float(np.abs(own / norms - 1.0).max()),
        "is_normalized": bool(np.abs(norms - 1.0).max() < _UNIT_TOLERANCE),
        "max_abs_error": float(np.abs(reference.astype(np.float64) - vectors).max()),
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
        "top10_overlap": float(shared.mean()),
    }


def centred_cosines(reference: NDArray[np.float32], vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Give each text's cosine with FP32, both vectors scaled to length 1 and less the mean of FP32's, float64[texts].

    The mean of FP32's is taken from both sides, so an offset that all the vectors have in common counts, too.
    """
    expected, found = unit(reference), unit(vectors)
    mean = expected.mean(axis=0)
    cosines: NDArray[np.float64] = np.clip(np.sum(unit(expected - mean) * unit(found - mean), axis=1), -1.0, 1.0)
    return cosines


def is_constant(reference: NDArray[np.float32]) -> bool:
    """Tell whether all vectors of float32[texts, dim] have one direction, so that centring leaves nothing."""
    rows = unit(reference)
    return bool(np.linalg.norm(rows - rows.mean(axis=0), axis=1).max() < _LEAST_SPREAD)


def ranking_losses(
    expected: NDArray[np.float64], found: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give regret@10 and the ratio of shared neighbours of each text, float64[texts] both.

    The regret of a text is (sum of FP32's similarities to FP32's ten nearest - to the artifact's ten nearest) /
    (sum to FP32's ten - 10 * FP32's mean similarity to all others): 0 where nothing is lost, 1 where ten drawn at
    random would do as well. Where all others are as similar, no choice loses anything. Sets of up to eleven texts take
    all the others.

    Args:
        expected: float64[texts, dim], FP32's unit vectors.
        found: float64[texts, dim], the artifact's.
    """
    count = len(expected)
    nearest = min(NEIGHBOURS, count - 1)
    regrets, shared = np.empty(count), np.empty(count)
    for start in range(0, count, _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        similarities, theirs = expected[rows] @ expected.T, found[rows] @ found.T
        here = np.arange(len(similarities))
        mean = (similarities.sum(axis=1) - similarities[here, start + here]) / (count - 1)
        similarities[here, start + here] = theirs[here, start + here] = -np.inf
        best, chosen = (np.argpartition(-each, nearest - 1, axis=1)[:, :nearest] for each in (similarities, theirs))
        most, taken = (np.take_along_axis(similarities, each, axis=1).sum(axis=1) for each in (best, chosen))
        possible = most - nearest * mean
        lost = np.maximum(most - taken, 0.0)
        regrets[rows] = np.where(lost > 0.0, lost / np.maximum(possible, np.finfo(np.float64).tiny), 0.0)
        shared[rows] = shared_neighbours(best, chosen)
    return regrets, shared


def shared_neighbours(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Give the ratio of entries that each row of two int64[rows, k] has in common, whatever their order."""
    shared: NDArray[np.float64] = (first[:, :, None] == second[:, None, :]).any(axis=2).mean(axis=1)
    return shared


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Give the mean of float64[texts], and low and high of its 95 % bootstrap interval; the same values give the same.

    1,000 resamples with a fixed seed, a hundred at a time: those of many texts would not fit in memory at once.
    """
    random, count, mean = np.random.default_rng(_SEED), len(values), float(values.mean())
    means = np.concatenate(
        [
            values[random.integers(count, size=(_BLOCK_RESAMPLES, count))].mean(axis=1)
            for _ in range(_RESAMPLES // _BLOCK_RESAMPLES)
        ]
    )
    low, high = np.quantile(means, _QUANTILES)
    return mean, min(float(low), mean), max(float(high), mean)


def similarity_correlation(expected: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Give Spearman's correlation of the cosines of all pairs of rows, of at most 3,000 evenly spaced rows."""
    chosen = np.linspace(0, len(expected) - 1, min(len(expected), _RANKED_TEXTS)).round().astype(int)
    upper = np.triu_indices(len(chosen), k=1)
    first, second = ((rows[chosen] @ rows[chosen].T)[upper] for rows in (expected, found))
    return rank_correlation(first, second)


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Give Spearman's rank correlation of two float64[n]; ties share their mean rank.

    Returns:
        In [-1, 1]; 0.0 where one side is constant.
    """
    one, other = (ranked - ranked.mean() for ranked in (ranks(first), ranks(second)))
    spread = float(np.sqrt(np.sum(one**2) * np.sum(other**2)))
    return float(np.clip(np.sum(one * other) / spread, -1.0, 1.0)) if spread > 0.0 else 0.0


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank from 1, ties sharing the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranked: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2.0)[inverse.reshape(-1)]
    return ranked


def exactness(recorded: NDArray[np.float32], vectors: NDArray[np.float32]) -> dict[str, float]:
    """Measure float32[texts, dim] against the vectors that another run of the same codes gave.

    Returns:
        The figures of `edgeq.records.Exactness`: cosines less the mean of the recorded vectors, and the largest error.
    """
    cosines = centred_cosines(recorded, vectors)
    return {
        "texts": len(vectors),
        "centred_cosine_mean": float(cosines.mean()),
        "centred_cosine_min": float(cosines.min()),
        "max_abs_error": float(np.abs(recorded.astype(np.float64) - vectors).max()),
    }


# --- end of vector measures ---------------------------------------------------------------------------------------


def unmeasurable(golden, vectors):
    """Say why vectors cannot be compared, or None."""
    for owner, rows in (("FP32", golden.reference), ("the artifact", vectors)):
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if bad.size:
            return f"{owner} gave NaN or infinity for {bad.size} of {len(rows)} inputs, first for number {bad[0] + 1}."
    if not golden.reference.any(axis=1).all():
        return "FP32's vector of an input is zero."
    return "FP32 gives all inputs one direction." if is_constant(golden.reference) else None


def measure(golden, vectors, invariance_min):
    """Compare vectors with FP32's, as edgeq's parity does."""
    worst = int(np.argmin(centred_cosines(golden.reference, vectors)))
    measures = measured(golden.reference, vectors)
    measures.update(texts=len(vectors), invariance_min=invariance_min, worst_text=golden.names[worst][:80])
    return measures


def agreement(golden, vectors):
    """Compare vectors with those of the machine that exported the bundle; None where it had none."""
    if golden.host is None or not np.isfinite(golden.host).all():
        return None
    return exactness(golden.host, vectors)


def judge(measures, host, manifest):
    """Give one sentence for each limit that is missed; NaN meets none.

    The golden inputs are too few for the limits on many texts: exactness against the exporting machine is judged, or,
    where that had no vectors, the centred cosine with FP32.
    """
    if host is not None:
        wanted = "exactness: centred cosine with the exporting machine is {:.6f} at worst; at least {:g} is needed."
        named = [(wanted, host["centred_cosine_min"], "exactness_min")]
    else:
        wanted = "{} is {{:.6f}}; at least {{:g}} is needed."
        named = [
            (wanted.format(f"centred cosine {each}"), measures[f"centred_cosine_{each}"], f"centred_cosine_{each}_min")
            for each in ("mean", "min")
        ]
    named.append(("invariance is {:.6f}; at least {:g} is needed.", measures["invariance_min"], "invariance_min"))
    floors = [(sentence, value, manifest.limit_of(key)) for sentence, value, key in named]
    failures = [sentence.format(value, limit) for sentence, value, limit in floors if not value >= limit]
    is_normalized = measures["is_normalized"]
    limit = manifest.limit_of("norm_error_max" if is_normalized else "norm_error_unnormalized_max")
    if not measures["norm_error_max"] <= limit:
        failures.append(f"norm error is {measures['norm_error_max']:.2e} of FP32's norm; at most {limit:g} is allowed.")
    return failures


def run_kind(manifest, accelerator, is_emulated):
    """Give the kind of run: on the device itself, or on a machine that stands in for it."""
    if is_emulated:
        return "emulator"
    return manifest.elsewhere if lacks(manifest, accelerator) else "device"


def validate(bundle, options, progress):
    """Check, run, measure and judge a bundle; give the report."""
    second = None if options.beside is None else bundle_of(options.beside)
    sums = check_sums(bundle, progress)
    manifest = Manifest(bundle, sums)
    golden = Golden(bundle, manifest)
    require_cpu(manifest)
    before = conditions()
    progress("load", 0, 1)
    runner, load_ms = load(manifest, options.threads)
    vectors, invariance_min = run_all(golden, runner, manifest, progress)
    ran_on = run_kind(manifest, runner.accelerator, options.emulated)
    is_device = ran_on == "device"
    cells = latencies(golden, runner, manifest, options.runs, options.warmup, progress) if is_device else []
    other = None
    if second is not None:
        if not is_device:
            raise Stop(UNSUPPORTED, f"--beside: {manifest.target} runs here on {ran_on}, whose times mean nothing.")
        other = beside(bundle, second, options, progress)
    problem = unmeasurable(golden, vectors)
    measures = host = None
    failures = [problem]
    if problem is None:
        measures, host = measure(golden, vectors, invariance_min), agreement(golden, vectors)
        failures = judge(measures, host, manifest)
    return {
        "format": 1,
        "target": manifest.target,
        "manifest_sha256": manifest.sha256,
        "transport": options.transport,
        "ran_on": ran_on,
        "status": "failed" if failures else "passed",
        "failures": failures,
        "measures": measures,
        "host": host,
        "machine": describe_machine(manifest, runner.accelerator),
        "tools": {"python": platform.python_version(), "numpy": np.__version__, **runner.tools},
        "threads": runner.threads,
        "load_ms": load_ms if is_device else None,
        "peak_memory_bytes": None if options.emulated else peak_memory_bytes(),
        "cells": cells,
        "beside": other,
        "before": before,
        "after": conditions(),
    }


# --- the command --------------------------------------------------------------------------------------------------


def printable(value):
    """Replace what is no printable sign in every string: a report is shown on terminals."""
    if isinstance(value, str):
        return "".join(sign if sign.isprintable() else " " for sign in value)
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_report(path, report):
    """Write the report whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with partial.open("wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(str(partial), str(path))  # noqa: PTH105
    except OSError as error:
        try:
            partial.unlink()
        except OSError:
            pass
        raise Stop(STORAGE, f"{path}: cannot be written ({error.strerror}). Give another --report.") from error


def summary(report):
    """Give the result in a few lines; latency is there only when it ran on the device."""
    lines = [f"{report['target']}: {report['status']}, ran on {report['ran_on']} ({report['machine']['cpu']})"]
    measures, host = report["measures"], report["host"]
    if measures is not None:
        lines.append(
            f"  {measures['texts']} golden inputs: centred cosine with FP32 {measures['centred_cosine_mean']:.6f} "
            f"mean, {measures['centred_cosine_min']:.6f} min, regret@10 {measures['regret_mean']:.5f}"
        )
    if host is not None:
        mean, least = host["centred_cosine_mean"], host["centred_cosine_min"]
        lines.append(f"  centred cosine with the exporting machine {mean:.6f} mean, {least:.6f} min")
    for cell in report["cells"]:
        found = cell["latency"]
        threads = report["threads"] or "own choice of"
        lines.append(
            f"  {cell['sequence']} tokens, {threads} threads: p50 {found['p50_ms']:.2f} ms, "
            f"p90 {found['p90_ms']:.2f}, p99 {found['p99_ms']:.2f} ({cell['runs']} runs)"
        )
    other = report["beside"]
    for cell in other["cells"] if other is not None else ():
        ends = "" if cell["low"] is None else f" [{cell['low']:.2f}, {cell['high']:.2f}]"
        told = f"{cell['median']:.2f}x{ends} {cell['verdict']} ({cell['pairs']} pairs)"
        lines.append(f"  {cell['sequence']} tokens, beside {other['target']}: {told}")
    lines += [f"  {failure}" for failure in report["failures"]]
    return "\n".join(lines)


def bundle_of(given):
    """Find the bundle: what was given, or the folder that this script lies in."""
    bundle = Path(given) if given is not None else Path(__file__).resolve().parent
    if not (bundle / SUMS).is_file():
        if (bundle / MANIFEST).is_file():
            raise corrupt(bundle / SUMS, "is not there, so no file can be checked")
        raise Stop(CONFIG, f"{bundle}: is no bundle ({SUMS} is not there). Name OUT/TARGET of an edgeq export.")
    return bundle


def report_of(given, bundle):
    """Decide where the report goes: beside the bundle, never into it, because the bundle would no longer be whole."""
    report = Path(given) if given is not None else bundle.resolve().parent / REPORT
    inside = bundle.resolve()
    if inside in (report.resolve(), *report.resolve().parents):
        raise Stop(CONFIG, f"--report {report}: lies inside the bundle, which must stay as it is. Name another path.")
    return report


def at_least(smallest):
    """Make a reader of whole numbers."""

    def read(text):
        number = int(text)
        if not smallest <= number <= 1_000_000:
            raise argparse.ArgumentTypeError(f"{text}: {smallest} to 1000000 is needed")
        return number

    return read


def arguments(words):
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="validate.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="the bundle; else the folder of this script")
    parser.add_argument("--report", metavar="FILE", help=f"where the report goes; else {REPORT} beside the bundle")
    parser.add_argument(
        "--runs", type=at_least(1), default=80, help="timed runs of each length, and rounds of --beside"
    )
    parser.add_argument("--warmup", type=at_least(0), default=5, help="runs, and rounds, before them")
    parser.add_argument("--threads", type=at_least(0), default=0, help="0 leaves it to the target")
    parser.add_argument("--beside", metavar="OTHER", help="another bundle: time both by turns")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # what --beside starts
    parser.add_argument("--transport", choices=TRANSPORTS, default="by-hand", help="how this machine was reached")
    parser.add_argument("--emulated", action="store_true", help="this processor is emulated: time nothing")
    return parser.parse_args(words)


def main(words=None):
    """Validate, write the report, print the result."""
    options = arguments(words)
    try:
        bundle = bundle_of(options.bundle)
        if options.serve:
            serve(bundle, options.threads)
            return 0
        path = report_of(options.report, bundle)
        report = printable(validate(bundle, options, Progress()))
        write_report(path, report)
    except Stop as stop:
        print(f"validate.py: {stop}", file=sys.stderr, flush=True)
        return stop.exit_code
    print(summary(report))
    if report["status"] == "failed":
        missed = " ".join(report["failures"])
        print(f"validate.py: {bundle}: misses the gate of {report['target']}: {missed}", file=sys.stderr, flush=True)
        return PARITY
    return 0


if __name__ == "__main__":
    sys.exit(main())
