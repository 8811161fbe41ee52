"""Run the verb `recommend`: choose codec, rescoring and index by a budget."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from edgeq.cli import console
from edgeq.cli.arguments import BundleDir
from edgeq.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", re.IGNORECASE)
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_SHOWN = 8


def recommend(
    bundle: BundleDir,
    texts: Annotated[Path, typer.Option(metavar="FILE", help="Texts like those to be searched: .txt, .jsonl, .csv.")],
    recall: Annotated[float, typer.Option(help="The least recall@10 against exact search in the floats.")] = 0.95,
    bytes_each: Annotated[
        float | None, typer.Option("--bytes", metavar="N", help="In memory for each document.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For all, such as 200MB; with --documents.")
    ] = None,
    documents: Annotated[str | None, typer.Option(metavar="COUNT", help="How many there will be, such as 1M.")] = None,
    column: Annotated[str | None, typer.Option(help="The column of --texts that holds the text.")] = None,
    index: Annotated[
        list[str] | None, typer.Option("--index", metavar="KIND,...", help="exact, hnsw, ivf; exact alone by default.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="0 leaves it to the target.")] = 0,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Measure codes of BUNDLE's vectors on your texts, and name those that hold a recall in the room that there is.

    A tenth of the texts, at most 500, ask for the others. Finer codes that order the candidates stay on disk and are
    not counted as memory.

    Raises:
        ConfigError: the room is not stated or stated twice, a size cannot be read, or there are too few texts.
    """
    from edgeq.bundle.load import load
    from edgeq.bundle.manifest import load_manifest
    from edgeq.cli.code_figures import kinds_of
    from edgeq.codecs.statistics import read_statistics
    from edgeq.data.batches import require_texts
    from edgeq.data.splits import deduplicate
    from edgeq.data.text_files import read_texts
    from edgeq.vectors.measure import normalised
    from edgeq.vectors.recommend import budget
    from edgeq.vectors.recommend import recommend as advise

    expected = None if documents is None else int(_size(documents, "--documents"))
    room = budget(bytes_each, None if memory is None else _size(memory, "--memory"), expected)
    kinds = kinds_of(index)
    given = deduplicate(read_texts(texts, column))
    manifest = load_manifest(bundle)
    require_texts(manifest.float_model.inputs, bundle, "Images cannot be indexed yet.")
    known = None if manifest.codecs is None else read_statistics(bundle / manifest.codecs.path)
    vectors = normalised(load(bundle, threads).encode_document(given))
    with console.stages() as progress:
        advice = advise(vectors, room, recall, known, kinds, expected, progress)
    if as_json:
        console.put_json(advice.model_dump(mode="json"))
        return
    rows = [
        [
            "yes" if each.holds else "no", each.figures.codec, each.figures.index,
            "-" if each.figures.rescoring is None else f"{each.figures.rescoring}, {each.figures.depth} a result",
            f"{each.memory_bytes_per_document:g}", f"{each.disk_bytes_per_document:g}",
            f"{each.figures.recall_at_10:.4f}", f"{each.figures.queries_per_second:,.0f}",
        ]
        for each in advice.choices[:_SHOWN]
    ]  # fmt: skip
    columns = ("holds", "codec", "index", "rescoring", "bytes in memory", "on disk", "recall@10", "queries/s")
    console.put_table(columns, rows, f"at most {room:g} bytes a document, recall@10 of at least {recall:g}")
    best = advice.best
    if best is None:
        console.put("Nothing holds both; the nearest stand first.")
    else:
        figures = best.figures
        rescoring = "" if figures.rescoring is None else f" --rescore {figures.rescoring}"
        console.put(
            f"edgeq index {bundle} --texts FILE --codec {figures.codec}{rescoring} --index {figures.index} --to FOLDER"
        )
        if figures.rescoring is not None:
            console.put(f"edgeq search FOLDER --rescore {figures.depth} --query TEXT")
    for note in advice.notes:
        console.note(note)


def _size(text: str, option: str) -> float:
    """Read a size or count such as 200MB, 1M or 64.

    Raises:
        ConfigError: it is none.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{option} {text}: is no size; a number with k, M or G is needed, such as 200MB or 1M.")
    return float(found[1]) * _FACTORS[found[2].lower()]
