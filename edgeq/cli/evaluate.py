"""Run the verb `evaluate`: score a bundle and FP32 on STS and retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeq.cli import console
from edgeq.cli.arguments import Against, BundleDir, find_float_model
from edgeq.cli.code_figures import kinds_of, listed, measured, put_figures
from edgeq.errors import ConfigError

if TYPE_CHECKING:
    from edgeq.evaluation.tasks import Comparison
    from edgeq.vectors.measure import CodeFigures


def evaluate(
    bundle: BundleDir,
    sts: Annotated[Path | None, typer.Option(metavar="FILE", help="Pairs with sentence1, sentence2, score.")] = None,
    retrieval: Annotated[Path | None, typer.Option(metavar="BEIR_DIR", help="corpus, queries and qrels.")] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...", help="With --retrieval: what codes lose: int8, int4, binary, pca128+int4, ..."
        ),
    ] = None,
    index: Annotated[
        list[str] | None, typer.Option("--index", metavar="KIND,...", help="With --codec: exact, hnsw, ivf.")
    ] = None,
    distractors: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --codec: more documents, which answer no query.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="With --codec: draw recall, .svg or .png.")] = None,
    against: Against = None,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Score BUNDLE and FP32 side by side on sentence similarity, on retrieval, or on both.

    With --codec, measure what codes of their vectors lose against FP32's exact search, and say how much of it is the
    model's, the code's and the index's.

    Raises:
        ConfigError: neither --sts nor --retrieval is given, or what is for codes without --retrieval and --codec.
    """
    if sts is None and retrieval is None:
        raise ConfigError("evaluate: no data is named; give --sts FILE, --retrieval BEIR_DIR, or both.")
    from edgeq.codecs.names import parse
    from edgeq.reports import code_plot

    codecs, kinds = listed(codec), kinds_of(index)
    if codecs and retrieval is None:
        raise ConfigError("--codec: is measured on retrieval, and --retrieval is not given. Give a folder with it.")
    if not codecs and (index or distractors or plot):
        raise ConfigError("--index, --distractors, --plot: are for codes, and --codec is not given. Give it, too.")
    for name in codecs:
        parse(name)
    if plot is not None:
        code_plot.require(plot)
    from edgeq.bundle.manifest import load_manifest
    from edgeq.data.batches import require_texts
    from edgeq.data.text_files import read_texts
    from edgeq.evaluation.datasets import load_beir, load_sts
    from edgeq.evaluation.tasks import evaluate_retrieval, evaluate_sts
    from edgeq.pipeline.validate import embedders

    # Data before models: a typo in a path should not cost a minute.
    pairs = None if sts is None else load_sts(sts)
    data = None if retrieval is None else load_beir(retrieval)
    more = [] if distractors is None else read_texts(distractors)
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
        result = evaluate_retrieval(data, *sides)
        document["retrieval"] = result.model_dump(mode="json")
        rows += [_figure("nDCG@10", result.ndcg_at_10), _figure("recall@10", result.recall_at_10)]
        rows.append(["top-10 overlap", "1", f"{result.top10_overlap:.4f}", f"{100 * result.top10_overlap:.2f} %"])
    figures: tuple[CodeFigures, ...] = ()
    if data is not None and codecs:
        figures = measured(bundle, manifest, data, more, sides, codecs, kinds)
        document["codes"] = [each.model_dump(mode="json") for each in figures]
        if plot is not None:
            code_plot.write(figures, plot)
    if as_json:
        console.put_json({"bundle": str(bundle), "target": manifest.target.name, **document})
    else:
        console.put_table(("figure", "FP32", manifest.target.name, "kept"), rows)
        if figures:
            put_figures(figures)


def _figure(name: str, figure: Comparison) -> list[str]:
    """Format a figure as a table row."""
    return [name, f"{figure.float32:.4f}", f"{figure.artifact:.4f}", f"{figure.retention_percent:.2f} %"]
