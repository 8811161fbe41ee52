"""Run the verb `search`: find the texts of an index that are nearest to queries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeq.cli import console
from edgeq.errors import ConfigError

if TYPE_CHECKING:
    from edgeq.vectors.index import FormLoss, Hit, Index


def search(
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="The --to of an `edgeq index`.")],
    query: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A query; may be given several times.")
    ] = None,
    queries: Annotated[Path | None, typer.Option(metavar="FILE", help="Queries: .txt, .jsonl, .csv.")] = None,
    results: Annotated[int, typer.Option(min=1, help="How many texts for each query.")] = 10,
    rescore: Annotated[int, typer.Option(min=1, help="Candidates for each result that finer codes order.")] = 30,
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file that was indexed: show its texts.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="Embed the queries with this bundle of the same model.")
    ] = None,
    is_exact: Annotated[bool, typer.Option("--exact", help="Refuse another form of the model that built it.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="0 leaves it to the target.")] = 0,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Find the texts of INDEX that are nearest to each query.

    The queries are embedded with the bundle that built the index. Another bundle of the same model is taken, and its
    loss measured; a bundle of another model is refused.

    Raises:
        ConfigError: no query is given, or --texts is another file than the one that was indexed.
    """
    from edgeq.data.text_files import read_records
    from edgeq.vectors.index import open_index, searching_embedder

    asked = [*(query or []), *(read_records(queries) if queries is not None else [])]
    if not asked:
        raise ConfigError('search: no query is given. Give --query "..." or --queries FILE.')
    opened = open_index(folder)
    embedder = searching_embedder(opened, bundle, threads)
    loss = opened.require_space(embedder, str(bundle or opened.record.bundle), is_exact)
    found = opened.hits(embedder.encode_query(asked), results, rescore)
    shown = {} if texts is None else _texts(opened, texts, {hit.row for hits in found for hit in hits})
    if as_json:
        console.put_json(_document(asked, found, shown, loss))
        return
    if loss is not None:
        console.note(
            f"{bundle}: another form of the model that built the index; on {loss.texts} of its texts cosine "
            f"{loss.cosine_mean:.5f} mean, {loss.cosine_min:.4f} min, and {100 * loss.neighbours_shared:.1f} % of the "
            "first ten results stay."
        )
    rows = [
        [text, str(place), hit.identifier, f"{hit.score:.4f}", *([shown[hit.row]] if shown else [])]
        for text, hits in zip(asked, found, strict=True) for place, hit in enumerate(hits, start=1)
    ]  # fmt: skip
    console.put_table(("query", "rank", "id", "score", *(["text"] if shown else [])), rows)


def _texts(index: Index, path: Path, rows: set[int]) -> dict[int, str]:
    """Read the texts of these rows.

    Raises:
        ConfigError: the file is another one.
    """
    from edgeq.vectors.texts import TextStream

    is_beir = index.record.texts.name.startswith("corpus.jsonl") and path.is_dir()
    stream = TextStream.of_beir(path) if is_beir else TextStream.of_file(path, index.record.texts.column)
    if stream.sha256() != index.record.texts.sha256:
        raise ConfigError(f"{stream.path}: is not the file that {index.folder} was built from. Give that one.")
    return {row: text for row, (text, _) in enumerate(stream) if row in rows}


def _document(
    asked: list[str], found: list[list[Hit]], shown: dict[int, str], loss: FormLoss | None
) -> dict[str, object]:
    """Give the results as JSON."""
    return {
        "queries": [
            {
                "query": text,
                "hits": [
                    {"row": hit.row, "id": hit.identifier, "score": hit.score}
                    | ({"text": shown[hit.row]} if shown else {})
                    for hit in hits
                ],
            }
            for text, hits in zip(asked, found, strict=True)
        ],
        "other_form": None if loss is None else loss.model_dump(mode="json"),
    }
