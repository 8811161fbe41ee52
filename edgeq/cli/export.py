"""Run the verb `export`: make a bundle of a model for each target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeq.cli import console
from edgeq.cli.arguments import TrustRemoteCode
from edgeq.cli.targets import TargetsDir

if TYPE_CHECKING:
    from edgeq.pipeline.bundling import Exported
    from edgeq.pipeline.request import ExportRequest
    from edgeq.records import Measures
    from edgeq.system.progress import Progress


def export(
    model: Annotated[
        str, typer.Argument(help="A model directory, an ONNX file, a hub id in the local cache, or a packaged name.")
    ],
    target: Annotated[list[str], typer.Option(help="What to lower for; repeatable. `edgeq targets` lists them.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Bundles go to DIR/TARGET.")],
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts to calibrate on: .txt, .jsonl, .csv.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column of --texts that holds the text.")] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Images to calibrate on, for a model of images.")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts, or a folder of images, to compare on; else 20 %.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Refuse texts that stand here; repeatable.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="How to pool a model that does not say it.")] = None,
    dim: Annotated[
        int | None, typer.Option(metavar="N", help="Keep the first N dimensions, of unit length again if the model's.")
    ] = None,
    tower: Annotated[str | None, typer.Option(help="Which tower of a model of both: text or image.")] = None,
    trust_remote_code: TrustRemoteCode = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Of an ONNX file: its tokenizer.json, or the folder that holds it."),
    ] = None,
    max_sequence: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Of an ONNX file: its longest text in tokens.")
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option("--normalize/--no-normalize", help="Of an ONNX file: give its vectors length 1.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, metavar="N", help="Calibrate on N of the texts.")] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Which N texts.")] = 0,
    scheme: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The scheme that `edgeq analyze --auto` wrote.")
    ] = None,
    promote: Annotated[
        bool,
        typer.Option(
            "--promote/--no-promote",
            help="Where the gate is missed: promote products to 16 bits or float until it holds.",
        ),
    ] = True,
    hidden_state: Annotated[
        bool, typer.Option("--hidden-state/--no-hidden-state", help="Keep the output last_hidden_state.")
    ] = True,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Write a bundle that misses its gate, marked so.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle made from other inputs.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Make the bundles on a Ray cluster; `local`: side by side here."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, convert nothing.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither read nor keep intermediate results.")] = False,
    directory: TargetsDir = None,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Take MODEL to a verified bundle for each target.

    Raises:
        ParityFailed: an artifact's vectors miss the gate of its target.
    """
    from edgeq.frontend.onnx.find import OnnxOptions
    from edgeq.pipeline import export as pipeline
    from edgeq.pipeline.request import ExportRequest
    from edgeq.system.cache import Cache
    from edgeq.targets import load_target

    store = Cache.temporary() if no_cache else Cache()
    request = ExportRequest(
        model=model,
        targets=tuple(load_target(name, directory) for name in dict.fromkeys(target)),
        out=out,
        texts=texts,
        column=column,
        images=images,
        validation=validation,
        evaluation=tuple(evaluation or ()),
        pooling=pooling,
        dim=dim,
        tower=tower,
        trust_remote_code=trust_remote_code,
        onnx=OnnxOptions(tokenizer, max_sequence, normalize),
        samples=samples,
        seed=seed,
        scheme=scheme,
        promote=promote,
        hidden_state=hidden_state,
        keep_failed=keep_failed,
        overwrite=overwrite,
        dry_run=dry_run,
        cache=store,
    )
    try:
        with console.stages() as progress:
            bundles = pipeline.export(request, progress) if ray is None else _on_cluster(request, progress, ray)
    finally:
        store.close()
    if as_json:
        console.put_json({"bundles": [_bundle(bundle) for bundle in bundles]})
    else:
        _put_bundles(bundles)
    pipeline.require_passed(bundles)


def _on_cluster(request: ExportRequest, progress: Progress, ray: str) -> tuple[Exported, ...]:
    from edgeq.devices.lab.export import export_on_cluster

    return export_on_cluster(request, progress, None if ray == "local" else ray)


def _bundle(exported: Exported) -> dict[str, Any]:
    """Describe a bundle as `export --json` does."""
    return {
        "target": exported.target,
        "path": exported.path or None,
        "status": exported.status,
        "ran_on": exported.ran_on,
        "parity": None if exported.parity is None else exported.parity.model_dump(mode="json"),
        "size_bytes": exported.size_bytes,
        "other_settings": [setting.model_dump(mode="json") for setting in exported.other_settings],
        "islands": [island.model_dump(mode="json") for island in exported.islands],
        "promotion": None if exported.promotion is None else exported.promotion.model_dump(mode="json"),
        "end_to_end": None if exported.end_to_end is None else exported.end_to_end.model_dump(mode="json"),
    }


def _quality(parity: Measures | None) -> list[str]:
    """Format the measures of the table, or dashes where nothing was measured."""
    if parity is None:
        return ["-"] * 4
    figures = (parity.centred_cosine_mean, parity.centred_cosine_min, parity.spearman, parity.regret_mean)
    return [f"{value:.4f}" for value in figures]


def _put_bundles(bundles: tuple[Exported, ...]) -> None:
    """Print a table of bundles, and the path of each."""
    rows = []
    for bundle in bundles:
        rows.append(
            [
                bundle.target,
                bundle.status,
                bundle.ran_on,
                *_quality(bundle.parity),
                console.megabytes(bundle.size_bytes),
            ]
        )
        for other in bundle.other_settings:
            if other.measures is not None:
                rows.append([f"  with {other.name}", "", other.ran_on, *_quality(other.measures), ""])
    columns = ("target", "status", "ran on", "centred cosine mean", "min", "Spearman", "regret@10", "size")
    console.put_table(columns, rows)
    for sentence in dict.fromkeys(item.end_to_end.sentence for item in bundles if item.end_to_end is not None):
        console.put(f"end to end: {sentence}")
    for bundle in bundles:
        for island in bundle.islands:
            console.put(f"{bundle.target}: {island.operator} stays float, outside the dialect ({island.place})")
        if bundle.promotion is not None:
            console.put(f"{bundle.target}: {bundle.promotion.sentence}")
        console.put(f"{bundle.target}: {bundle.path or 'no bundle was written'}")
