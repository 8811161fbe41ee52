"""Run Arm's compiler Vela in a child process, and read its summary and its reasons for host operators.

Source: ethos-u-vela 5.2.0, `OPTIONS.md` (options), `ethosu/vela/stats_writer.py` (columns of the summary).
"""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeq.backends.ethos_u import crashing_operator
from edgeq.errors import ConfigError, LoweringFailed, TimedOut, ToolMissing
from edgeq.system.cache import Cache
from edgeq.system.files import storage_errors, work_dir, write_bytes
from edgeq.system.worker import fate

_CONFIG_FILE = "Arm/vela.ini"
_TIME_LIMIT_S = 600.0
LOGS = "logs"

_REASON = re.compile(r"operator: (?P<kind>\S+), ofm: '(?P<output>[^']*)'\s*\nReason: (?P<reason>.+)")
_OPTION = re.compile(r"CliOptionError: '?(?:Error: )?(?P<text>.+?)'?$", re.MULTILINE)
_LOG_LINES = 5


@dataclass(frozen=True)
class Settings:
    """Hold Vela's options: the accelerator, its clock and memories, by Vela's names."""

    accelerator: str
    system_config: str
    memory_mode: str
    arena_kib: int


@dataclass(frozen=True)
class Compiled:
    """Hold a compiled file, Vela's summary by column, and the reason for each tensor that the host computes."""

    data: bytes
    summary: Mapping[str, str]
    reasons: Mapping[str, str]


def compile_file(data: bytes, name: str, settings: Settings, time_limit_s: float = _TIME_LIMIT_S) -> Compiled:
    """Compile a .tflite file of one signature.

    Args:
        data: the file.
        name: begins messages, e.g. "ethos-u55-256: seq_128".
        settings: of the accelerator.
        time_limit_s: for the whole run.

    Raises:
        ConfigError: Vela knows no such accelerator, system configuration or memory mode.
        LoweringFailed: Vela refuses the file, dies, or writes no summary.
        TimedOut: the time limit is over.
        ToolMissing: Vela cannot be started.
    """
    with work_dir() as folder:
        source = folder / "model.tflite"
        source.write_bytes(data)
        status, log = run_vela(source, folder, settings, name, time_limit_s)
        written, summaries = folder / "model_vela.tflite", list(folder.glob("model_summary_*.csv"))
        if status == 0 and written.is_file() and len(summaries) == 1:
            found = Compiled(written.read_bytes(), _summary(summaries[0]), _reasons(log))
            _require(found.summary, settings, name)
            return found
        option = _OPTION.search(log)
        if option is not None:
            raise ConfigError(f"{name}: Vela: {option['text']}. Name one that {_CONFIG_FILE} of ethos-u-vela holds.")
        kept = _keep(log, name)
        if status < 0:
            found_in = crashing_operator.find(data, lambda one: _dies(one, folder, settings, name, time_limit_s))
            where = f"; of {found_in} alone it dies too" if found_in else "; of none of its operators alone does it die"
            raise LoweringFailed(f"{name}: Vela {fate(status)}{where}. Its log: {kept}. Report the model to Vela.")
        raise LoweringFailed(
            f"{name}: Vela {fate(status)} and wrote no file. Its log: {kept}, which ends:\n{_tail(log)}"
        )


def run_vela(source: Path, folder: Path, settings: Settings, name: str, time_limit_s: float) -> tuple[int, str]:
    """Run Vela; give its exit status and its output.

    Raises:
        TimedOut: the time limit is over.
        ToolMissing: the interpreter cannot be started.
    """
    command = [
        sys.executable, "-I", "-m", "ethosu.vela", str(source), "--output-dir", str(folder), "--config", _CONFIG_FILE,
        "--accelerator-config", settings.accelerator, "--system-config", settings.system_config,
        "--memory-mode", settings.memory_mode, "--arena-cache-size", str(settings.arena_kib * 1024),
        "--show-cpu-operations",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", check=False, timeout=time_limit_s, cwd=folder,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TimedOut(f"{name}: Vela did not end within {time_limit_s:g} s. Give it a shorter bucket.") from error
    except OSError as error:
        raise ToolMissing(f"{name}: {command[0]} cannot be started ({error.strerror}); install Python again") from error
    return done.returncode, done.stdout


def number(compiled: Compiled, column: str) -> float:
    """Give the number in a column of Vela's summary.

    Raises:
        LoweringFailed: the column is missing, or holds no number.
    """
    try:
        return float(compiled.summary[column])
    except (KeyError, ValueError) as error:
        raise LoweringFailed(f"Vela's summary has no number in its column {column}; pin ethos-u-vela") from error


def _dies(data: bytes, folder: Path, settings: Settings, name: str, time_limit_s: float) -> bool:
    """Tell whether Vela dies of a signal on a file."""
    source = folder / "one.tflite"
    source.write_bytes(data)
    return run_vela(source, folder, settings, name, time_limit_s)[0] < 0


def _summary(path: Path) -> dict[str, str]:
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.DictReader(file))


def _reasons(log: str) -> dict[str, str]:
    """Read Vela's reason for each tensor that the host computes."""
    return {found["output"]: found["reason"].strip() for found in _REASON.finditer(log)}


def _require(summary: Mapping[str, str], settings: Settings, name: str) -> None:
    """Compare the options in Vela's summary with those given: some fall back to a default without an error.

    Raises:
        LoweringFailed: Vela compiled for another accelerator, configuration or memory mode.
    """
    wanted = {
        "accelerator_configuration": settings.accelerator.replace("ethos-u", "Ethos_U").replace("-", "_"),
        "system_config": settings.system_config,
        "memory_mode": settings.memory_mode,
    }
    for column, value in wanted.items():
        if summary.get(column) != value:
            raise LoweringFailed(f"{name}: Vela compiled for {column} {summary.get(column)}; {value} was asked for")


def _keep(log: str, name: str) -> Path:
    """Write a log into the cache: Vela's work folder is removed."""
    path = Cache().root / LOGS / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}-vela.log"
    with storage_errors(f"writing {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, log.encode())
    return path


def _tail(log: str) -> str:
    return "\n".join(log.strip().splitlines()[-_LOG_LINES:])
