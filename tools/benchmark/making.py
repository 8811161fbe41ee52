"""Make what is compared: edgeq's bundles by its own command, the peers by scripts in their own environments."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmark.figures import Blank, Figures
from benchmark.processes import Ran, first_line, last_line, measured
from benchmark.real_models import PACKAGED, damage, folder_of, packaged_minilm
from benchmark.rows import BUCKETS, FLOAT, OWN, Row, private
from edgeq.backends.tflite import TFLITE_RUNTIME
from edgeq.bundle.float_model import float_model
from edgeq.bundle.manifest import load_manifest
from edgeq.data.splits import sample
from edgeq.data.text_files import default_texts, read_texts
from edgeq.data.tokenizer import Tokenizer
from edgeq.errors import ToolMissing
from edgeq.system import environments
from edgeq.system.cache import LOCATION_VARIABLE, Cache
from edgeq.system.files import sha256_file
from edgeq.targets import data_dir, load_target

MAX_SEQUENCE = 256
PEER_TEXTS = 128  # ONNX Runtime's calibrator keeps what it observes: more texts take gigabytes
_FROM_SOURCE = ("litert-torch", "sentence-transformers-exporters")
MAKERS = Path(__file__).with_name("makers")


@dataclass(frozen=True)
class Made:
    """Say where a row's model lies and what making it took; without a path, the figures are blanks."""

    row: Row
    path: Path | None
    figures: Figures

    @property
    def reason(self) -> str:
        """Say why there is no model."""
        blank = self.figures["seconds"]
        return blank.reason if isinstance(blank, Blank) else ""


MINILM = "all-MiniLM-L6-v2"
MODELS = (MINILM, *PACKAGED)


@dataclass(frozen=True)
class Subject:
    """Say which trained model is measured.

    Attributes:
        name: as the tables show it.
        given: what `edgeq export` is given.
        options: its options for this model.
        source: the folder that sentence-transformers opens; None for an ONNX file.
    """

    name: str
    given: str
    options: tuple[str, ...]
    source: Path | None


def subject(name: str) -> Subject:
    """Find a trained model.

    Raises:
        SystemExit: there is no such model, or it was not fetched, or its files are not the known ones.
    """
    if name == MINILM:
        return Subject(name, name, (), packaged_minilm())
    if name not in PACKAGED:
        raise SystemExit(f"--model is {name!r}; {', '.join(MODELS[:-1])} or {MODELS[-1]} is needed")
    folder, model = folder_of(name), PACKAGED[name]
    problem = damage(folder, model)
    if problem is not None:
        raise SystemExit(f"{name}: {folder}: {problem}; run tools/real_models {name}")
    if model.has_own_tokenizer:
        return Subject(name, str(folder), (), folder)
    tokenizer = packaged_minilm() / "tokenizer.json"
    options = ("--tokenizer", str(tokenizer), "--max-sequence", str(model.max_sequence))
    return Subject(name, str(folder / model.loads), options, None)


class Workshop:
    """Make rows of one model below one folder, with one cache that starts empty."""

    def __init__(self, folder: Path, model: Subject | None = None) -> None:
        """Take a folder; what an earlier run made there with the same command is used again."""
        self.folder = folder
        self._model = model
        self.cache = folder / "cache"
        self.cache.mkdir(parents=True, exist_ok=True)
        shared = Cache().root / environments.KIND
        shared.mkdir(parents=True, exist_ok=True)
        if not (self.cache / environments.KIND).exists():  # private environments are no part of an export's cost
            (self.cache / environments.KIND).symlink_to(shared)

    @cached_property
    def subject(self) -> Subject:
        """Give the model: the given one, or all-MiniLM-L6-v2 in its package."""
        return self._model or subject(MINILM)

    def export(self, out: Path, *targets: str, options: Sequence[str] = (), cache: Path | None = None) -> Ran:
        """Export the model for targets."""
        command = [sys.executable, "-m", "edgeq", "export", self.subject.given, "--out", str(out), "--quiet", *options]
        command += self.subject.options
        command += [word for target in targets for word in ("--target", target)]
        env = os.environ | {LOCATION_VARIABLE: str(cache or self.cache)}
        return measured(command, out.parent / f"{out.name}.log", env)

    def own(self, rows: Iterable[Row]) -> dict[str, Made]:
        """Make edgeq's bundles one after the other: all after the first use its calibration."""
        return {row.name: self._bundle(row) for row in rows}

    def _bundle(self, row: Row) -> Made:
        if not (data_dir("targets") / f"{row.target}.toml").is_file():
            return missing(row, f"there is no target {row.target} yet")
        out = self.folder / "bundles"
        out.mkdir(exist_ok=True)
        bundle = out / row.target
        record = self.folder / f"{row.target}.json"
        if not (record.is_file() and bundle.is_dir()):
            note(f"exporting {row.target}")
            if load_target(row.target).runtime.get("interpreter") == TFLITE_RUNTIME.name:
                environments.interpreter(TFLITE_RUNTIME)  # made once, no part of an export's cost
            ran = self.export(out, row.target)
            if ran.exit_code:
                return missing(row, f"edgeq export: exit code {ran.exit_code}: {last_line(ran.log)}")
            files = [bundle / file.path for file in load_manifest(bundle).artifact.files]
            _record(record, ran.seconds, ran.peak_gb, files)
        return Made(row, bundle, json.loads(record.read_text(encoding="utf-8")))

    def float_model(self) -> Path:
        """Give the FP32 file that all bundles come from."""
        return float_model(load_manifest(self._any_bundle()), None, self.cache)

    def tokenizer(self) -> Tokenizer:
        """Give the model's tokenizer; it cuts texts at 256 tokens, or at the model's own limit where that is less."""
        longest = load_manifest(self._any_bundle()).source.max_sequence
        return Tokenizer.from_file(self._any_bundle() / "tokenizer.json", min(longest, MAX_SEQUENCE))

    def _any_bundle(self) -> Path:
        return self.folder / "bundles" / OWN[0].target

    def qdq_model(self, bundle: Path) -> Path:
        """Give the QDQ model that a bundle was lowered from; a bundle names it and does not carry it."""
        wanted = load_manifest(bundle).qdq_model.file
        for path in sorted(self.cache.rglob("*.onnx")):
            if path.stat().st_size == wanted.size_bytes and sha256_file(path) == wanted.sha256:
                return path
        raise SystemExit(f"{bundle}: its QDQ model is not in {self.cache}; remove the folder and run again")

    def peers(self, rows: Iterable[Row]) -> dict[str, Made]:
        """Make the peers, each from the same float model and the same calibration texts."""
        job = self._inputs()
        made: dict[str, Made] = {}
        for row in rows:
            made[row.name] = self._peer(row, job, made)
        return made

    def _inputs(self) -> dict[str, object]:
        """Write the peers' calibration texts, as texts and as padded tokens."""
        texts = sample(read_texts(default_texts()[0]), PEER_TEXTS, seed=0)
        ids = self.tokenizer().encode(texts).ids
        width = max(map(len, ids))
        feeds = {name: np.zeros((len(ids), width), np.int64) for name in ("input_ids", "attention_mask")}
        for row, tokens in enumerate(ids):
            feeds["input_ids"][row, : len(tokens)] = tokens
            feeds["attention_mask"][row, : len(tokens)] = 1
        np.savez(self.folder / "feeds.npz", **feeds)
        (self.folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        return {
            "float_model": str(self.float_model()), "source": str(self.subject.source or ""), "buckets": BUCKETS,
            "feeds": str(self.folder / "feeds.npz"), "texts": str(self.folder / "texts.json"),
        }  # fmt: skip

    def _peer(self, row: Row, job: dict[str, object], made: dict[str, Made]) -> Made:
        before = made.get(row.follows)
        if row.follows and (before is None or before.path is None):
            return missing(row, f"{row.follows} is not there, which it is made from")
        if self.subject.source is None and row.environment in _FROM_SOURCE:
            return missing(row, "it starts from a folder of sentence-transformers, and the model is an ONNX file")
        out = self.folder / "peers" / f"{row.maker}-{row.form}"
        record = out / "made.json"
        if not record.is_file():
            out.mkdir(parents=True, exist_ok=True)
            note(f"making {row.name}")
            try:
                python = interpreter(row)
            except ToolMissing as error:
                return missing(row, first_line(error))
            asked = job | {"out": str(out), "form": row.form, "base": str(before.path) if before else ""}
            ran = measured([*python, MAKERS / f"{row.maker}.py", json.dumps(asked)], out / "log")
            if ran.exit_code:
                return missing(row, f"{row.maker}: exit code {ran.exit_code}: {last_line(ran.log)}")
            seconds, peak = (before.figures["seconds"], before.figures["peak_gb"]) if before else (0.0, 0.0)
            _record(record, ran.seconds + seconds, max(ran.peak_gb, peak), [out / file for file in row.files])
        return Made(row, out / row.loads, json.loads(record.read_text(encoding="utf-8")))


def interpreter(row: Row) -> list[str]:
    """Give the command that starts a row's Python; a private one sees nothing of this checkout.

    Raises:
        ToolMissing: its environment cannot be made.
    """
    return [str(environments.interpreter(private(row.environment))), "-I"] if row.environment else [sys.executable]


def reference(path: Path) -> Made:
    """Describe FP32, which nobody has to make."""
    return Made(Row(FLOAT, "onnxruntime"), path, {"seconds": Blank("what the others are made from"),
                "peak_gb": Blank("what the others are made from"), "size_mb": path.stat().st_size / 1e6})  # fmt: skip


def mirror(row: Row, bundles: dict[str, Made], workshop: Workshop) -> Made:
    """Describe the QDQ model of a bundle, to be run in another runtime."""
    own = bundles.get(row.mirrors)
    if own is None or own.path is None:
        return missing(row, f"{row.mirrors} is not there, whose QDQ model it is")
    return Made(row, workshop.qdq_model(own.path), {})


def missing(row: Row, reason: str) -> Made:
    """Describe a row that could not be made."""
    note(f"{row.name}: skipped: {reason}")
    return Made(row, None, dict.fromkeys(("seconds", "peak_gb", "size_mb"), Blank(reason)))


def note(text: str) -> None:
    """Report progress."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _record(path: Path, seconds: float, peak_gb: float, files: Sequence[Path]) -> None:
    """Keep what making took beside what was made."""
    size = sum(file.stat().st_size for file in files) / 1e6
    path.write_text(json.dumps({"seconds": seconds, "peak_gb": peak_gb, "size_mb": size}), encoding="utf-8")
