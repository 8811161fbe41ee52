"""Measure what is compiled for NPUs: vectors where the maker's emulator, its simulator or host kernels run it.

None of these devices is here. Nothing is timed but the compilers, and their estimates of a device are called estimates.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from benchmark import quality, samples
from benchmark.figures import Blank, Figures
from benchmark.making import Made, Workshop, missing, note, reference
from benchmark.rows import HTP8, HTP16, HTP16_V68, NPU, NPU_PEERS, OWN, RK3588, Row, chosen
from benchmark.runners import Runner
from edgeq.backends.qnn import compiling
from edgeq.backends.qnn.static import static
from edgeq.backends.rockchip import COMPILED, FEEDS, FOLDER, MODEL
from edgeq.bundle.manifest import load_manifest
from edgeq.data.splits import evenly_spaced
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import fitted
from edgeq.graph.static_shapes import fix_shapes
from edgeq.quantization.vendor import rewrite_for_vendor
from edgeq.records import Manifest, VendorSpec
from edgeq.system.cache import log_path
from edgeq.system.host import run_kind

TEXTS = 200  # emulating one takes seconds
LONGEST = 128  # of the targets' buckets, in tokens
_PLAIN = VendorSpec(opset=19, dtype="float16", output_ratio_max=1.0)  # only the operators are rewritten


def measure(workshop: Workshop, data: Path, wanted: Sequence[str] | None) -> Figures:
    """Make the bundles and what they are compared with, and measure all of them on the same texts."""
    own = workshop.own([OWN[0], *chosen(NPU, wanted)])
    made = {name: item for name, item in own.items() if name != OWN[0].name}
    peers = [] if RK3588 not in made else [_peer(row, made[RK3588], workshop) for row in chosen(NPU_PEERS, wanted)]
    tokenizer, base = workshop.tokenizer(), reference(workshop.float_model())
    texts = spread(quality.fitting(tokenizer, samples.load(data).texts, LONGEST), TEXTS)
    with Runner(base, base.row.threads) as runner:
        expected = quality.embedded(runner, tokenizer, texts)
    rows = [*made.values(), *peers]
    return {
        "tools": _tools(made),
        "quality": {item.row.name: _quality(item, expected, texts, tokenizer) for item in rows},
        "compiling": {name: _compiling(made[name], workshop) for name in (HTP16, HTP16_V68, HTP8) if name in made},
        "estimates": {name: found for name, item in made.items() if (found := _estimates(item))},
    }


def spread(texts: Sequence[str], count: int) -> list[str]:
    """Take so many texts, evenly over all of them."""
    return [texts[row] for row in evenly_spaced(len(texts), count)]


def _quality(item: Made, expected: quality.Vectors, texts: Sequence[str], tokenizer: Tokenizer) -> Figures:
    """Give a row's figures, where they come from, and the size of the file for the longest texts."""
    compared, _ = quality.against(item, expected, texts, tokenizer)
    if item.path is None:
        return {"size_mb": Blank(item.reason), "ran_on": "", **compared.figures}
    if not item.row.target:
        size, ran_on = (item.path / COMPILED.format(LONGEST)).stat().st_size, "simulator"
    else:
        manifest = load_manifest(item.path)
        size, ran_on = _size(manifest, LONGEST), str(run_kind(manifest.target.runs_on))
    return {"size_mb": size / 1e6, "ran_on": ran_on, **compared.figures}


def _size(manifest: Manifest, length: int) -> int:
    """Give the bytes of what is compiled for one length."""
    return max(ref.size_bytes for ref in manifest.artifact.files if f"seq_{length}" in ref.path)


def _compiling(made: Made, workshop: Workshop) -> Figures:
    """Compile each length of an HTP bundle again, by the clock, and count where the compiler put the graph.

    Returns:
        length -> seconds of the whole child process, partitions, nodes on the CPU, and the size of the shipped binary.
    """
    if made.path is None:
        return {str(LONGEST): dict.fromkeys(("seconds", "partitions", "cpu_nodes", "size_mb"), Blank(made.reason))}
    manifest, figures = load_manifest(made.path), {}
    source, settings = workshop.qdq_model(made.path), compiling.options(manifest.target)
    for length in sorted(manifest.target.buckets_tokens):
        note(f"compiling: {made.row.name}, {length} tokens")
        with tempfile.TemporaryDirectory() as name:
            model, context = Path(name) / "model.onnx", Path(name) / compiling.CONTEXT.format(length)
            model.write_bytes(static(ir.load(source), length, manifest.target).SerializeToString(deterministic=True))
            began, log = time.perf_counter(), log_path(compiling.LOGS, manifest.target.name, f"seq_{length}")
            with compiling.worker(compiling.COMPILE_LIMIT_S) as child:
                reply = child.call(do="compile", model=str(model), context=str(context), options=settings, log=str(log))
            seconds = time.perf_counter() - began
        elsewhere = [part for part in reply["partitions"] if part["provider"] != compiling.PROVIDER]
        figures[str(length)] = {
            "seconds": seconds,
            "partitions": len(reply["partitions"]) - len(elsewhere),
            "cpu_nodes": sum(len(part["nodes"]) for part in elsewhere),
            "size_mb": _size(manifest, length) / 1e6,
        }
    return figures


def _estimates(made: Made) -> Figures:
    """Repeat Vela's estimates of a bundle: length -> milliseconds with the clock and memories that it assumes.

    Empty where there are none, because another compiler made the files.
    """
    if made.path is None:
        return {}
    placement, figures = load_manifest(made.path).artifact.placement, {}
    for found in placement.estimates:
        on_host = [item.operator for item in placement.host_operators if item.file == found.file]
        figures[found.file.split("_")[-2]] = {
            "estimated_ms": found.estimated_ms, "clock_mhz": found.clock_hz / 1e6, "cycles": found.cycles,
            "system_config": found.system_config, "memory_mode": found.memory_mode,
            "arena_kib": found.arena_bytes / 1024, "sram_kib": found.sram_bytes / 1024,
            "dram_or_flash_kib": (found.dram_bytes + found.flash_bytes) / 1024,
            "host_operators": len(on_host), "on_host": ", ".join(on_host),
        }  # fmt: skip
    return figures


def _peer(row: Row, bundle: Made, workshop: Workshop) -> Made:
    """Write what Rockchip's compiler gets when nobody tells it where its 8 bits go: a model of each length, and feeds.

    The plain model is edgeq's FP32 export in the older operators that the compiler reads; the equalised one is the
    bundle's. The feeds are the bundle's own.
    """
    if bundle.path is None:
        return missing(row, f"{RK3588} is not there, whose feeds it takes")
    source, _, how = row.form.partition("-")
    folder, given = workshop.folder / "peers" / f"rockchip-{row.form}", bundle.path / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    equalised = (given / MODEL).read_bytes()
    plain, _, _ = rewrite_for_vendor(onnx.load(workshop.float_model()), {}, _PLAIN)
    content = equalised if source == "equalised" else plain.SerializeToString(deterministic=True)
    target = load_manifest(bundle.path).target
    for length in target.buckets_tokens:
        fixed = fix_shapes(ir.from_proto(onnx.load_model_from_string(content)), length)
        (folder / f"seq_{length}.onnx").write_bytes(fixed.SerializeToString(deterministic=True))
        (folder / f"seq_{length}.txt").write_text(_feeds(folder, length, json.loads((given / FEEDS).read_bytes())))
    is_hybrid = how == "hybrid"
    asked = {"platform": target.runtime["platform"], "buckets": target.buckets_tokens, "auto_hybrid": is_hybrid}
    (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    return Made(row, folder, {})


def _feeds(folder: Path, length: int, texts: Sequence[Sequence[int]]) -> str:
    """Write ids and mask of each text, int64[1, length], and give the list of these files that the toolkit reads."""
    lines = []
    for row, ids in enumerate(texts):
        names = [folder / f"seq_{length}_{row}_{name}.npy" for name in ("ids", "mask")]
        for name, tokens in zip(names, (list(ids), [1] * len(ids)), strict=True):
            np.save(name, fitted(np.array([tokens[:length]], np.int64), length))
        lines.append(f"{' '.join(map(str, names))}\n")
    return "".join(lines)


def _tools(made: Mapping[str, Made]) -> dict[str, str]:
    """Give the versions of what compiled the bundles."""
    found: dict[str, str] = {}
    for item in made.values():
        found |= load_manifest(item.path).artifact.tools if item.path is not None else {}
    return dict(sorted(found.items()))
