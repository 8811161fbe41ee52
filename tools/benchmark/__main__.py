"""Measure edgeq beside its peers: what each takes to make, its quality, its speed. Called by `tools/bench`.

Everything is measured in one run on one machine and on the same texts: each latency in a process of its own, the models
taking turns; memory as the peak of the whole process tree. A figure that could not be had is blank, with the reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from benchmark import clock, codes, cost, device, integer_only, merging, npu, quality, report, samples
from benchmark.figures import Figures
from benchmark.goals import judged
from benchmark.making import MINILM, MODELS, Made, Workshop, mirror, note, reference, subject
from benchmark.merging import QUALITY, RUN
from benchmark.rows import GEMM, INT, MIRRORS, OWN, PEERS, chosen, private
from edgeq.bundle.manifest import load_manifest
from edgeq.system.host import describe, run_kind

PARTS = ("export", "device", "latency", "throughput", "tflite", "calibration", QUALITY, "npu", "codes", "million")
Part = Callable[[str, Callable[[], Figures]], None]
ALONE = frozenset({"export", "device", "npu", "codes", "million"})  # parts that share no models with the others
MERGED = ALONE | {QUALITY}  # whose tables say which run they come from
_OWN_TOOLS = ("edgeq", "onnxruntime", "ai-edge-litert")
_PEER_TOOLS = (
    "openvino", "nncf", "litert-torch", "ai-edge-quantizer", "sentence-transformers", "optimum-intel", "optimum-onnx",
)  # fmt: skip


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="tools/bench", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="sts_dev.jsonl, squad11dev/, calib_20k.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for bench.md and bench.json")
    parser.add_argument(
        "--model", default=MINILM, metavar="NAME",
        help=f"the trained model: {', '.join(MODELS)}; tools/real_models fetches all but the first",
    )  # fmt: skip
    parser.add_argument("--every", type=int, default=1, help="compare quality on every so-many-th text")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part; repeatable")
    parser.add_argument("--row", action="append", help="take models whose name holds this only; repeatable")
    parser.add_argument("--limit", type=int, help="compare quality on so many texts only, without STS and retrieval")
    parser.add_argument("--work", type=Path, help="make models in this folder, and use again what lies there")
    parser.add_argument(
        "--merge", action="store_true",
        help="put the parts of --only (codes, device, export, million, npu, quality) into the report in --out, beside "
        "what other runs measured; quality beside that of other models",
    )  # fmt: skip
    options = parser.parse_args(words)
    if options.merge and not set(options.only or PARTS) <= MERGED:
        parser.error(f"--merge takes parts that share no models with others: --only {' or '.join(sorted(MERGED))}")
    if options.merge and options.row and options.only not in (["npu"], [QUALITY]):
        parser.error("--merge takes single rows of one of the parts npu and quality: --only npu")
    if options.every < 1:
        parser.error(f"--every is {options.every}; 1 or more is needed")
    return options


def require_files(options: argparse.Namespace) -> None:
    """Look for what is read at the end, before an hour of work.

    Raises:
        SystemExit: a file of --data, or the report that --merge adds to, is not there.
    """
    read = [options.data / name for name in samples.FILES]
    missing = [path for path in (read + [options.out / report.JSON] * options.merge) if not path.exists()]
    if missing:
        raise SystemExit(
            f"{missing[0]}: is not there; --data needs {', '.join(samples.FILES)}, --merge a report in --out"
        )


def main() -> int:
    """Measure what is asked for; exit 1 when a goal is missed."""
    options = options_of()
    model = subject(options.model)
    require_files(options)
    with tempfile.TemporaryDirectory() as name:
        results = measured(options, Workshop((options.work or Path(name)).resolve(), model))
    if options.merge:
        results = merging.merged(report.read(options.out), results, options.only or PARTS, bool(options.row))
    report.write(results, options.out)
    sys.stdout.write(report.markdown(results))
    return int(any(row[3] == "MISSED" for row in judged(results)))


def measured(options: argparse.Namespace, workshop: Workshop) -> Figures:
    """Make the models and measure every part."""
    results: Figures = {
        "model": options.model,
        "machine": describe(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    began, parts = time.perf_counter(), options.only or PARTS

    def part(name: str, how: Callable[[], Figures]) -> None:
        if name in parts:
            note(f"== {name}, after {time.perf_counter() - began:.0f} s")
            results[name] = how()

    part("export", lambda: cost.export(workshop))
    part("device", lambda: device.validation(workshop.own([row for row in OWN if row.name == GEMM])[GEMM]))
    if set(parts) - ALONE:
        compare_models(options, workshop, results, part)
    part("npu", lambda: npu.measure(workshop, options.data, options.row))
    part("codes", lambda: codes.compare(workshop, options.data, options.every))
    part("million", lambda: codes.million(workshop, options.data))
    note(f"== done, after {time.perf_counter() - began:.0f} s")
    return results


def compare_models(options: argparse.Namespace, workshop: Workshop, results: Figures, part: Part) -> None:
    """Measure the parts that compare the same models: edgeq's and the peers'."""
    # The first is always made: tokenizer and FP32 come from it. What is compared is what a user gets who asks for
    # nothing special.
    own = workshop.own([OWN[0], *chosen(OWN[1:], options.row)])
    peers = workshop.peers(chosen(PEERS, options.row))
    base = reference(workshop.float_model())
    made = [base, *own.values(), *peers.values()]
    results["making"] = {item.row.name: item.figures | place_of(item) for item in made}
    results["threads"] = {item.row.name: item.row.threads for item in made}

    def compare() -> Figures:
        whole = samples.thinned(samples.load(options.data), options.every)
        rows = [*made[1:], *(mirror(row, own, workshop) for row in MIRRORS if row.mirrors in own)]
        compared = quality.compare(rows, base, whole, workshop.tokenizer(), options.limit, workshop.folder)
        figures = {item.row.name: compared[item.row.name].figures | shape_of(item) for item in rows}
        pairs = quality.pairwise(compared, base.row.name, schemes(own))
        run = {key: results[key] for key in RUN}
        return {options.model: {"run": run, "every": options.every, "rows": figures, **pairs}}

    # What other work on the machine disturbs comes first; quality takes longest, and does not depend on it.
    part("latency", lambda: clock.latencies(made))
    part("throughput", lambda: clock.throughputs(made))
    if INT in own:
        part("tflite", lambda: integer_only.costs(own[INT], workshop))
    part("calibration", lambda: cost.calibration(workshop, options.data))
    part(QUALITY, compare)


def schemes(own: dict[str, Made]) -> dict[str, str]:
    """Give the scheme of each of edgeq's models, mirrors too."""
    found = {name: load_manifest(made.path).target.scheme for name, made in own.items() if made.path is not None}
    return found | {row.name: found[row.mirrors] for row in MIRRORS if row.mirrors in found}


def place_of(made: Made) -> Figures:
    """Say whether a model ran on the hardware that it is made for."""
    if not made.row.target or made.path is None:
        return {}
    return {"ran_on": run_kind(load_manifest(made.path).target.runs_on)}


def shape_of(made: Made) -> Figures:
    """Give the size of what a runtime loads, and of edgeq's bundles how many products were promoted to 16 bits."""
    if made.path is None:
        return {}
    if made.row.mirrors:
        return {"promoted": "", "size_mb": ""}  # the same model's other row says it
    promoted = len(load_manifest(made.path).qdq_model.scheme.promoted) if made.row.target else ""
    return {"promoted": promoted, "size_mb": made.figures["size_mb"]}


def versions() -> dict[str, str]:
    """Give the versions of the tools that made and ran the models."""
    found = {name: version(name) for name in _OWN_TOOLS}
    environments = {row.environment for row in PEERS} - {""}
    pinned = {pin.partition("==")[::2] for name in environments for pin in private(name).requirements}
    for name in _PEER_TOOLS:
        there = sorted({number for tool, number in pinned if tool == name})
        found[f"{name} (peers)"] = " and ".join(there)
    return found


if __name__ == "__main__":
    sys.exit(main())
