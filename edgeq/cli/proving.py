"""The verbs that prove what a bundle is worth: verify, validate, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeq.cli import console
from edgeq.errors import ConfigError, ParityFailed

if TYPE_CHECKING:
    from edgeq.evaluation.tasks import Comparison
    from edgeq.records import Manifest, ParityReport

BundleDir = Annotated[Path, typer.Argument(metavar="BUNDLE", help="OUT/TARGET, as `edgeq export` wrote it.")]
Against = Annotated[
    Path | None,
    typer.Option("--against", metavar="FILE", help="The bundle's FP32 model; else it is looked for in the cache."),
]


def verify(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="OUT/TARGET, as `edgeq export` wrote it, or a release's archive.")
    ],
    public_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check an archive's signature with it (PEM or minisign).")
    ] = None,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Hash every file of BUNDLE, walk its chain of records, and run its golden texts here.

    Raises:
        ConfigError: a public key is given for what is no archive.
    """
    from edgeq.bundle.verify import verify as verify_bundle
    from edgeq.release.archives import verify_archive

    if bundle.is_file():
        found = verify_archive(bundle, public_key)
    elif public_key is not None:
        raise ConfigError(f"{bundle}: is no archive, and only archives are signed. Leave --public-key out.")
    else:
        found = verify_bundle(bundle)
    if as_json:
        console.put_json(found.model_dump(mode="json"))
        return
    if found.max_abs_error is not None:
        told = f"the same vectors on {found.machine} ({found.ran_on}; max abs error {found.max_abs_error:.1e})"
    elif found.float32_cosine_min is not None:
        told = f"cosine {found.float32_cosine_min:.6f} with FP32 or more on {found.machine} ({found.ran_on})"
    else:
        told = "no vectors, because they were not run"
        console.note(f"not run: {found.reason}")
    whole = f"{found.files} files are whole" if public_key is None else f"signed, {found.files} files are whole"
    console.put(
        f"{found.path}: {whole}, the chain holds, and {found.golden_texts} golden texts give "
        f"{told}. The bundle for {found.target} is recorded as {found.status}."
    )


def validate(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="OUT/TARGET of `edgeq export`; several for --lab.")
    ],
    texts: Annotated[Path | None, typer.Option(metavar="FILE", help="Compare on these; else on edgeq's own.")] = None,
    column: Annotated[str | None, typer.Option(help="The column of --texts that holds the text.")] = None,
    images: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Compare on these, for images.")] = None,
    against: Against = None,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE", help="local, ssh://user@host[:port], adb:SERIAL or arm64: the device script there."
        ),
    ] = None,
    device_python: Annotated[str, typer.Option(help="The Python there that has the runtime.")] = "python3",
    native: Annotated[
        Path | None, typer.Option(metavar="FILE", help="LiteRT's benchmark_model, for a phone without Python.")
    ] = None,
    keep: Annotated[bool, typer.Option(help="Leave sent files there for the next run.")] = True,
    time_limit: Annotated[float, typer.Option(min=1.0, help="Seconds for all of it.")] = 900.0,
    runs: Annotated[int, typer.Option(min=1, max=1_000_000, help="Timed runs of each length on a device.")] = 50,
    threads: Annotated[int, typer.Option(min=0, max=4096, help="0 leaves it to the target.")] = 0,
    lab: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Run on each device of a TOML file that takes the target.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="With --lab: write one page of results.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="With --lab: the Ray cluster to use; else this machine.")
    ] = None,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Measure BUNDLE's parity with FP32 on texts or images, here, and judge it by its target's gate.

    With --on the device script runs the golden inputs in that place instead, and its report is kept beside BUNDLE;
    with --lab it does so on each device of a list, one bundle at a time on a device, devices side by side.

    Raises:
        ParityFailed: the vectors miss the gate.
    """
    if lab is not None:
        _refuse_beside_on(texts=texts, column=column, images=images, against=against, on=on, native=native)
        from edgeq.cli import placing

        return placing.validate_lab(bundles, lab, runs, ray, html, as_json)
    if html is not None or ray is not None or len(bundles) > 1:
        raise ConfigError("validate: several bundles, --html and --ray are for --lab FILE. Name one bundle.")
    (bundle,) = bundles
    if on is not None:
        _refuse_beside_on(texts=texts, column=column, images=images, against=against)
        from edgeq.cli.placing import conclude
        from edgeq.devices.contract import Job
        from edgeq.devices.transports import Access, place_of

        place = place_of(on, Access(device_python, native, keep))
        with console.stages() as told:
            job = Job(bundle, runs=runs, threads=threads, time_limit_s=time_limit, progress=told)
            found_there = place.validate(job)
        return conclude(found_there, place, bundle, as_json)
    from edgeq.bundle.manifest import load_manifest
    from edgeq.pipeline.validate import require_kind
    from edgeq.pipeline.validate import validate as validate_bundle

    manifest = load_manifest(bundle)
    require_kind(manifest, bundle, texts, images)
    float_file = find_float_model(manifest, against)
    with console.stages() as report:
        found = validate_bundle(bundle, texts, column, float_file, report, images)
    if as_json:
        console.put_json(found.model_dump(mode="json"))
    else:
        _put_report(found)
    if found.status == "failed":
        raise ParityFailed(f"{bundle}: misses the gate of {found.target}: {' '.join(found.failures)}")


def _refuse_beside_on(**given: object) -> None:
    """Refuse options that say what to compare on: in another place the golden inputs are compared."""
    found = [f"--{name}" for name, value in given.items() if value is not None]
    if found:
        raise ConfigError(f"--on and --lab run the golden inputs of the bundle; drop {' and '.join(found)}.")


def evaluate(
    bundle: BundleDir,
    sts: Annotated[Path | None, typer.Option(metavar="FILE", help="Pairs with sentence1, sentence2, score.")] = None,
    retrieval: Annotated[Path | None, typer.Option(metavar="BEIR_DIR", help="corpus, queries and qrels.")] = None,
    against: Against = None,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Score BUNDLE and FP32 side by side on sentence similarity, on retrieval, or on both.

    Raises:
        ConfigError: neither --sts nor --retrieval is given.
    """
    if sts is None and retrieval is None:
        raise ConfigError("evaluate: no data is named; give --sts FILE, --retrieval BEIR_DIR, or both.")
    from edgeq.bundle.manifest import load_manifest
    from edgeq.data.batches import require_texts
    from edgeq.evaluation.datasets import load_beir, load_sts
    from edgeq.evaluation.tasks import evaluate_retrieval, evaluate_sts
    from edgeq.pipeline.validate import embedders

    # Data before models: a typo in a path should not cost a minute.
    pairs = None if sts is None else load_sts(sts)
    data = None if retrieval is None else load_beir(retrieval)
    manifest = load_manifest(bundle)
    require_texts(manifest.float_model.inputs, bundle, "Measure images with `edgeq validate BUNDLE --images FOLDER`.")
    sides = embedders(bundle, find_float_model(manifest, against))
    rows: list[list[str]] = []
    document: dict[str, object] = {}
    if pairs is not None:
        sts_result = evaluate_sts(pairs, *sides)
        document["sts"] = sts_result.model_dump(mode="json")
        rows.append(_figure("STS Spearman", sts_result.spearman))
    if data is not None:
        result = evaluate_retrieval(data, manifest.source.prompts, *sides)
        document["retrieval"] = result.model_dump(mode="json")
        rows += [_figure("nDCG@10", result.ndcg_at_10), _figure("recall@10", result.recall_at_10)]
        rows.append(["top-10 overlap", "1", f"{result.top10_overlap:.4f}", f"{100 * result.top10_overlap:.2f} %"])
    if as_json:
        console.put_json({"bundle": str(bundle), "target": manifest.target.name, **document})
    else:
        console.put_table(("figure", "FP32", manifest.target.name, "kept"), rows)


def find_float_model(manifest: Manifest, against: Path | None) -> Path:
    """Find a bundle's FP32 model: the named file, or the cache's."""
    from edgeq.bundle.float_model import float_model
    from edgeq.system.cache import Cache

    return float_model(manifest, against, Cache().root)


def _figure(name: str, figure: Comparison) -> list[str]:
    """Turn a figure into a table row."""
    return [name, f"{figure.float32:.4f}", f"{figure.artifact:.4f}", f"{figure.retention_percent:.2f} %"]


def _put_report(report: ParityReport) -> None:
    """Print what was measured beside its limit, and where."""
    from edgeq.evaluation.gate import norm_limit
    from edgeq.records import TextSet

    measures, gate = report.measures, report.gate
    rows: list[list[str]] = []
    if measures is not None:
        rows = [
            ["cosine mean", f"{measures.cosine_mean:.5f}", f">= {gate.cosine_mean_min:g}"],
            ["cosine min", f"{measures.cosine_min:.5f}", f">= {gate.cosine_min_min:g}"],
            ["top-10 overlap", f"{measures.top10_overlap:.4f}", f">= {gate.top10_overlap_min:g}"],
            ["Spearman of similarities", f"{measures.spearman:.5f}", f">= {gate.spearman_min:g}"],
            ["invariance", f"{measures.invariance_min:.7f}", f">= {gate.invariance_min:g}"],
            ["norm error", f"{measures.norm_error_max:.1e}", f"<= {norm_limit(measures, gate):g}"],
            ["max abs error", f"{measures.max_abs_error:.4f}", "-"],
        ]
    place = f"ran on {report.ran_on} ({report.machine})"
    kind = "texts" if isinstance(report.texts, TextSet) else "images"
    title = f"{report.target}: {report.status}, on {report.texts.count} {kind}, {place}"
    console.put_table(("measure", "value", "gate"), rows, title)
    if measures is not None:
        console.put(f"farthest from FP32: {measures.worst_text}")
    if isinstance(report.texts, TextSet) and report.texts.truncated:
        console.note(f"{report.texts.truncated} of {report.texts.count} texts were cut at the model's limit")
