"""Run the verb `validate`: measure a bundle's parity again, here or on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeq.cli import console
from edgeq.cli.arguments import Against, find_float_model
from edgeq.errors import ConfigError, ParityFailed

if TYPE_CHECKING:
    from edgeq.records import ParityReport


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
        from edgeq.cli import devices

        return devices.validate_lab(bundles, lab, runs, ray, html, as_json)
    if html is not None or ray is not None or len(bundles) > 1:
        raise ConfigError("validate: several bundles, --html and --ray are for --lab FILE. Name one bundle.")
    (bundle,) = bundles
    if on is not None:
        _refuse_beside_on(texts=texts, column=column, images=images, against=against)
        from edgeq.cli.devices import conclude
        from edgeq.devices.contract import Job
        from edgeq.devices.transports import Access, transport_of

        transport = transport_of(on, Access(device_python, native, keep))
        with console.stages() as progress:
            job = Job(bundle, runs=runs, threads=threads, time_limit_s=time_limit, progress=progress)
            found_there = transport.validate(job)
        return conclude(found_there, transport, bundle, as_json)
    from edgeq.bundle.manifest import load_manifest
    from edgeq.pipeline.validate import require_kind
    from edgeq.pipeline.validate import validate as validate_bundle

    manifest = load_manifest(bundle)
    require_kind(manifest, bundle, texts, images)
    float_file = find_float_model(manifest, against)
    with console.stages() as progress:
        found = validate_bundle(bundle, texts, column, float_file, progress, images)
    if as_json:
        console.put_json(found.model_dump(mode="json"))
    else:
        _put_report(found)
    if found.status == "failed":
        raise ParityFailed(f"{bundle}: misses the gate of {found.target}: {' '.join(found.failures)}")


def _refuse_beside_on(**given: object) -> None:
    """Refuse the options of texts and images beside --on and --lab, which compare the golden inputs.

    Raises:
        ConfigError: one of them is given.
    """
    found = [f"--{name}" for name, value in given.items() if value is not None]
    if found:
        raise ConfigError(f"--on and --lab run the golden inputs of the bundle; drop {' and '.join(found)}.")


def _put_report(report: ParityReport) -> None:
    """Print each measure beside its limit, and the machine of the run."""
    from edgeq.evaluation.gate import shown
    from edgeq.records import TextSet

    measures, gate = report.measures, report.gate
    rows: list[list[str]] = []
    if measures is not None:
        rows = [list(row) for row in shown(measures, gate)]
    if report.exactness is not None:
        found, limit = report.exactness.centred_cosine_min, gate.exactness_min
        name = f"exactness: centred cosine with the QDQ model, worst of {report.exactness.texts}"
        rows.append([name, f"{found:.5f}", f">= {limit:g}"])
    place = f"ran on {report.ran_on} ({report.machine})"
    kind = "texts" if isinstance(report.texts, TextSet) else "images"
    title = f"{report.target}: {report.status}, on {report.texts.count} {kind}, {place}"
    if report.measured == "qdq-model":
        title += "; against FP32: its QDQ model in ONNX Runtime"
    console.put_table(("measure", "value", "gate"), rows, title)
    console.put(f"end to end: {report.end_to_end.sentence}")
    for other in report.other_settings:
        if other.measures is None:
            console.put(f"with {other.name}: not measured, because {other.reason}")
        else:
            mean, least = other.measures.centred_cosine_mean, other.measures.centred_cosine_min
            told = f"centred cosine mean {mean:.5f}, min {least:.5f}, regret@10 {other.measures.regret_mean:.5f}"
            console.put(f"with {other.name} ({other.ran_on}): {told}")
    if measures is not None:
        console.put(f"farthest from FP32: {measures.worst_text}")
    if isinstance(report.texts, TextSet) and report.texts.truncated:
        console.note(f"{report.texts.truncated} of {report.texts.count} texts were cut at the model's limit")
