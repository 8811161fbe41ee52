"""Run the verb `index`: build a searchable index of texts' codes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from edgeq.cli import console
from edgeq.cli.arguments import BundleDir
from edgeq.errors import ConfigError


class IndexKind(StrEnum):
    """Name the kinds of indexes."""

    EXACT = "exact"
    HNSW = "hnsw"
    IVF = "ivf"


def index(
    bundle: BundleDir,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Where the index goes.")],
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts: .txt, .jsonl, .csv, each also .gz, read one by one.")
    ] = None,
    retrieval: Annotated[
        Path | None, typer.Option(metavar="BEIR_DIR", help="Index the corpus of such a folder.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column of --texts that holds the text.")] = None,
    codec: Annotated[
        str, typer.Option(metavar="NAME", help="int8, int4, rabitq2, binary, pq32, pca128+int4, ...")
    ] = "int8",
    rescore: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Codec of the finer codes that order the candidates; none: leave them out."),
    ] = None,
    kind: Annotated[IndexKind, typer.Option("--index", help="exact reads every code.")] = IndexKind.EXACT,
    batch_size: Annotated[int, typer.Option(min=1, help="The most texts run at once.")] = 32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index of other inputs.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="0 leaves it to the target.")] = 0,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Embed texts with BUNDLE, keep their codes, and build an index of them.

    A stopped or killed build goes on where it was when the same command is given again. Codes coarser than 8 bits get
    int8 codes beside them, which order the candidates (--rescore).

    Raises:
        ConfigError: neither or both of --texts and --retrieval are given, BUNDLE takes images, or the texts cannot be
            read.
    """
    if (texts is None) == (retrieval is None):
        raise ConfigError("index: give the texts, either --texts FILE or --retrieval BEIR_DIR.")
    from edgeq.bundle.load import load
    from edgeq.bundle.manifest import load_manifest
    from edgeq.codecs.names import parse
    from edgeq.data.batches import require_texts
    from edgeq.vectors.build import IndexRequest, build
    from edgeq.vectors.texts import TextStream

    parse(codec)
    if retrieval is not None:
        stream = TextStream.of_beir(retrieval)
    else:
        stream = TextStream.of_file(texts or Path(), column)
    manifest = load_manifest(bundle)
    require_texts(manifest.float_model.inputs, bundle, "An index of images is not there yet.")
    loaded = load(bundle, threads)
    request = IndexRequest(
        bundle=bundle,
        manifest=manifest,
        embed=lambda some: loaded.encode_document(some, batch_size=batch_size),
        texts=stream,
        codec=codec,
        rescoring="" if rescore == "none" else rescore,
        kind=kind.value,
        folder=to,
        overwrite=overwrite,
    )
    with console.stages() as progress:
        record = build(request, progress)
    if as_json:
        console.put_json({"path": str(to)} | record.model_dump(mode="json"))
    else:
        console.put(str(to))
