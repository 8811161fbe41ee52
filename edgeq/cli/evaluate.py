"""Run the verb `evaluate`: score a bundle and FP32 on STS and retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeq.cli import console
from edgeq.cli.arguments import Against, BundleDir, find_float_model
from edgeq.errors import ConfigError

if TYPE_CHECKING:
    from edgeq.evaluation.tasks import Comparison


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
        result = evaluate_retrieval(data, *sides)
        document["retrieval"] = result.model_dump(mode="json")
        rows += [_figure("nDCG@10", result.ndcg_at_10), _figure("recall@10", result.recall_at_10)]
        rows.append(["top-10 overlap", "1", f"{result.top10_overlap:.4f}", f"{100 * result.top10_overlap:.2f} %"])
    if as_json:
        console.put_json({"bundle": str(bundle), "target": manifest.target.name, **document})
    else:
        console.put_table(("figure", "FP32", manifest.target.name, "kept"), rows)


def _figure(name: str, figure: Comparison) -> list[str]:
    """Format a figure as a table row."""
    return [name, f"{figure.float32:.4f}", f"{figure.artifact:.4f}", f"{figure.retention_percent:.2f} %"]
