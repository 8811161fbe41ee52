"""Hold a bundle's vectors on an emulated 64-bit Arm against those it has on x86 and against FP32's.

Called by `tools/arm64 compare BUNDLE`. The golden texts' token ids go through the artifact in LiteRT's own Arm
build. No latency is measured: an emulator's says nothing about a device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.bundle.checksums import check_sums
from edgeq.bundle.golden import GoldenData, read_golden
from edgeq.bundle.manifest import load_manifest
from edgeq.cli.console import put_json, put_table
from edgeq.data.sessions import unit
from edgeq.errors import ConfigError, EdgeqError, LoweringFailed, ParityFailed, TimedOut, ToolMissing
from edgeq.evaluation.vector_measures import centred_cosines
from edgeq.system.files import work_dir

HERE = Path(__file__).resolve().parent
BACKEND = "tflite"
MACHINE = "aarch64"
COSINE_MEAN_MIN = 0.997  # Arm against x86: the same integers, rounded by other kernels
LIMIT_S = 3600.0
GRID_TOLERANCE = 0.01  # of a step: how far float32 may put a vector's value beside its code


@dataclass(frozen=True)
class Codes:
    """Hold what came out of an artifact.

    Attributes:
        codes: int8[texts, dim].
        scale: float32[texts].
        zero_point: int64[texts].
    """

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int64]

    def vectors(self) -> NDArray[np.float32]:
        """Give float32[texts, dim]."""
        shifted = self.codes.astype(np.float64) - self.zero_point[:, None]
        return (shifted * self.scale[:, None]).astype(np.float32)


@dataclass(frozen=True)
class Figures:
    """Hold what was measured. `code_difference_max` is None where x86's vectors are not codes times a scale."""

    texts: int
    centred_cosine_x86_mean: float
    centred_cosine_x86_min: float
    centred_cosine_float32_mean: float
    centred_cosine_float32_min: float
    code_difference_max: int | None


def bucket_feeds(golden: GoldenData, lengths: Sequence[int]) -> tuple[dict[str, NDArray[Any]], int]:
    """Put each text into the smallest length that holds it, as `arm64_child.py` reads it.

    Returns:
        The arrays by name, and how many texts were cut. A cut text keeps its last token: it ends every text, and a
        tokenizer that cuts keeps it too.
    """
    rows: dict[int, list[tuple[int, list[int]]]] = {}
    longest, cut = max(lengths), 0
    for row, tokens in enumerate(golden.token_ids()):
        kept = tokens
        if len(tokens) > longest:
            kept, cut = [*tokens[: longest - 1], tokens[-1]], cut + 1
        rows.setdefault(min(length for length in lengths if length >= len(kept)), []).append((row, kept))
    arrays: dict[str, NDArray[Any]] = {}
    for length, texts in rows.items():
        ids = np.full((len(texts), length), golden.pad_id, np.int32)
        mask = np.zeros((len(texts), length), np.int32)
        for place, (_, tokens) in enumerate(texts):
            ids[place, : len(tokens)], mask[place, : len(tokens)] = tokens, 1
        arrays[f"rows_{length}"] = np.array([row for row, _ in texts], np.int64)
        arrays[f"input_ids_{length}"], arrays[f"attention_mask_{length}"] = ids, mask
    return arrays, cut


def run_child(command: Sequence[str], model: Path, feeds: dict[str, NDArray[Any]]) -> tuple[Codes, dict[str, Any]]:
    """Run `arm64_child.py` behind a command; give the codes, and what it says of where it ran.

    Raises:
        LoweringFailed: the child refused the file or died.
        TimedOut: it took longer than an hour.
    """
    with work_dir("edgeq-arm64-") as folder:
        given, made = folder / "feeds.npz", folder / "codes.npz"
        np.savez(given, **feeds)
        child = [*command, str(HERE / "arm64_child.py"), str(model), str(given), str(made)]
        try:
            done = subprocess.run(child, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise TimedOut(f"{model}: not done after {LIMIT_S:.0f} s. Give it fewer golden texts.") from error
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise LoweringFailed(f"{model}: LiteRT ended with {done.returncode}: {last}")
        with np.load(made, allow_pickle=False) as archive:
            codes = Codes(archive["codes"], archive["scale"], archive["zero_point"])
    where: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return codes, where


def code_difference(codes: Codes, vectors: NDArray[np.float32]) -> int | None:
    """Give the largest difference of codes; None where the vectors do not lie on the codes' grid."""
    steps = vectors.astype(np.float64) / codes.scale[:, None] + codes.zero_point[:, None]
    nearest = np.rint(steps)
    if np.abs(steps - nearest).max() > GRID_TOLERANCE:
        return None
    return int(np.abs(codes.codes - nearest).max())


def measure(golden: GoldenData, codes: Codes) -> Figures:
    """Compare the codes with x86's vectors and FP32's.

    Raises:
        ParityFailed: they have another shape, or a scale is no positive number, or a vector is zero.
    """
    if codes.codes.shape != golden.embeddings.shape:
        raise ParityFailed(f"{MACHINE}: vectors have shape {codes.codes.shape}; {golden.embeddings.shape} is needed")
    if not (np.isfinite(codes.scale).all() and (codes.scale > 0).all()):
        raise ParityFailed(f"{MACHINE}: an output's scale is not above 0")
    found = unit(codes.vectors())
    if not found.any(axis=1).all():
        raise ParityFailed(f"{MACHINE}: text {int(np.argmin(found.any(axis=1))) + 1}: its vector is zero")
    to_x86, to_float32 = (centred_cosines(rows, codes.vectors()) for rows in (golden.embeddings, golden.reference))
    return Figures(
        texts=len(found),
        centred_cosine_x86_mean=float(to_x86.mean()),
        centred_cosine_x86_min=float(to_x86.min()),
        centred_cosine_float32_mean=float(to_float32.mean()),
        centred_cosine_float32_min=float(to_float32.min()),
        code_difference_max=code_difference(codes, golden.embeddings),
    )


def failure(figures: Figures) -> str | None:
    """Say what misses the limit; NaN meets none."""
    mean = figures.centred_cosine_x86_mean
    if mean >= COSINE_MEAN_MIN:
        return None
    return f"centred cosine mean of {MACHINE} against x86 is {mean:.5f}; {COSINE_MEAN_MIN} is needed"


def compare(bundle: Path, as_json: bool) -> None:
    """Run the golden texts in emulation, print the figures, then judge.

    Raises:
        ConfigError: it is no bundle, or another backend's.
        BundleCorrupt: a file is damaged.
        ToolMissing: the emulation cannot be set up.
        LoweringFailed: LiteRT refused the artifact there.
        TimedOut: it took longer than an hour.
        ParityFailed: the vectors are too far from x86's.
    """
    manifest = load_manifest(bundle)
    target = manifest.target
    if manifest.artifact.backend != BACKEND:
        raise ConfigError(f"{bundle}: backend is {manifest.artifact.backend!r}; {BACKEND!r} is needed.")
    if not target.buckets_tokens:
        raise ConfigError(f"{bundle}: target {target.name} names no buckets_tokens; one signature each is needed.")
    check_sums(bundle)
    golden = read_golden(bundle)
    feeds, cut = bucket_feeds(golden, target.buckets_tokens)
    ready = subprocess.run([HERE / "arm64", "setup"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    if ready.returncode != 0:
        raise ToolMissing("the emulated Arm is not set up: see above.")
    codes, where = run_child([str(HERE / "arm64"), "run"], bundle / manifest.artifact.files[0].path, feeds)
    if where["machine"] != MACHINE:
        raise EdgeqError(
            f"ran on {where['machine']} instead of {MACHINE}. This is a defect of edgeq; please report it."
        )
    figures = measure(golden, codes)
    missed = failure(figures)
    document = {
        "target": target.name,
        "ran_on": "emulator",
        **where,
        "texts_cut": cut,
        **asdict(figures),
        "centred_cosine_x86_mean_min": COSINE_MEAN_MIN,
        "status": "passed" if missed is None else "failed",
    }
    put_json(document) if as_json else show(document)
    if missed is not None:
        raise ParityFailed(missed)


def show(document: dict[str, Any]) -> None:
    """Print one row for each kind of vectors that Arm's were compared with."""
    rows = []
    for name, key in (("x86", "x86"), ("FP32", "float32")):
        cosines = [f"{document[f'centred_cosine_{key}_{which}']:.5f}" for which in ("mean", "min")]
        difference = document["code_difference_max"] if key == "x86" else None
        codes = "-" if difference is None else str(difference)
        rows.append([name, str(document["texts"]), *cosines, codes, document["ran_on"]])
    columns = ("against", "texts", "centred cosine mean", "min", "codes differ by", "ran_on")
    put_table(columns, rows, title=f"{document['target']} on {document['machine']}")
    if document["texts_cut"]:
        print(f"{document['texts_cut']} texts were cut at the longest signature", file=sys.stderr)


def main() -> int:
    """Read the arguments, and turn an error into its exit code."""
    parser = argparse.ArgumentParser(prog="tools/arm64 compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON document")
    arguments = parser.parse_args()
    try:
        compare(arguments.bundle, arguments.as_json)
    except EdgeqError as error:
        print(f"tools/arm64: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
