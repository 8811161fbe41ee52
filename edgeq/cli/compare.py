"""Run the verb `compare`: show the bundles of one model side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeq.cli import console
from edgeq.cli.arguments import Against, TrustRemoteCode
from edgeq.cli.code_figures import listed, put_figures
from edgeq.errors import ConfigError

if TYPE_CHECKING:
    from edgeq.reports.contents import Card, Row


def compare(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="The --out of an export, or bundles one by one.")
    ],
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare on these; else on the export's validation texts.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column of --texts that holds the text.")] = None,
    sts: Annotated[Path | None, typer.Option(metavar="FILE", help="Pairs with sentence1, sentence2, score.")] = None,
    retrieval: Annotated[Path | None, typer.Option(metavar="BEIR_DIR", help="corpus, queries and qrels.")] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME,...", help="With --retrieval: what codes lose, and each one's queries elsewhere."),
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Time the runtimes by turns, in processes of their own.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="Of each runtime that is timed; 0: every core.")] = 0,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the card as one HTML page.")] = None,
    against: Against = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Where torch finds the source; else under its recorded name.")
    ] = None,
    trust_remote_code: TrustRemoteCode = None,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Show the same texts through FP32, torch and every bundle of one model, side by side.

    Raises:
        ConfigError: --codec is given without --retrieval, or names no codec.
    """
    from edgeq.codecs.names import parse
    from edgeq.reports import card, card_page
    from edgeq.reports.card import Request
    from edgeq.system.cache import Cache

    if html is not None:
        card_page.require(html)
    codecs = listed(codec)
    if codecs and retrieval is None:
        raise ConfigError("--codec: is measured on retrieval, and --retrieval is not given. Give a folder with it.")
    for name in codecs:
        parse(name)
    request = Request(
        bundles=tuple(bundles),
        cache=Cache().root,
        texts=texts,
        column=column,
        sts=sts,
        retrieval=retrieval,
        codecs=codecs,
        against=against,
        model=model,
        trust_remote_code=trust_remote_code,
        latency=latency,
        threads=threads,
    )
    with console.stages() as progress:
        found = card.make_card(request, progress)
    if html is not None:
        card_page.write(found, html)
    if as_json:
        console.put_json(found.model_dump(mode="json"))
        return
    _put_card(found)
    if html is not None:
        console.put(f"{html}")


def _put_card(card: Card) -> None:
    """Print a line for each runtime, the cosine of each pair, and the notes."""
    cut = f"at most {card.token_limit} tokens of {card.texts.count} texts ({card.texts.origin})"
    has_sts, has_ndcg = card.sts_pairs is not None, card.retrieval_queries is not None
    timed = sorted({time.tokens for row in card.rows for time in row.latency})
    columns = ["runtime", "scheme", "centred cosine mean", "min", "regret@10", "Spearman"]
    columns += ["STS"] * has_sts + ["nDCG@10"] * has_ndcg
    columns += [f"{tokens} tokens, ms" for tokens in timed] + ["size", "ran on"]
    rows = [_line(row, has_sts, has_ndcg, timed) for row in card.rows]
    console.put_table(columns, rows, f"{card.model}: {cut}; on {card.machine}")
    names = list(dict.fromkeys(name for pair in card.pairs for name in (pair.first, pair.second)))
    means = {frozenset((pair.first, pair.second)): f"{pair.cosine_mean:.5f}" for pair in card.pairs}
    if len(names) > 2:
        matrix = [[name, *(means.get(frozenset((name, other)), "-") for other in names)] for name in names]
        console.put_table(("centred cosine mean", *names), matrix)
    if card.codes:
        put_figures(card.codes)
    for row in card.rows:
        if row.reason is not None:
            console.put(f"{row.name}: {row.reason}")
    for text in card.worst_texts[:1]:
        console.put(f"farthest from FP32: {' '.join(text.text.split())[:80]}")
    for item in card.layers:
        entry = None if item.errors is None else item.errors.entry
        where = "" if entry is None else f"most error enters at {entry.label}: cosine {entry.cosine_mean:.5f}"
        console.put(f"{item.scheme}: {item.reason or where or 'no residual stream is found'}")
    for sentence in card.end_to_end:
        console.note(f"end to end: {sentence}")
    _put_ratios(card, timed)
    for note in card.notes:
        console.note(note)


def _put_ratios(card: Card, timed: list[int]) -> None:
    """Print how much faster than the reference each runtime is, with the interval and what it tells."""
    ratios = {row.name: {time.tokens: time.speedup for time in row.latency if time.speedup} for row in card.rows}
    told = [ratio for each in ratios.values() for ratio in each.values()]
    if not told:
        return
    rows = [
        [name, *(each[tokens].shown() if tokens in each else "-" for tokens in timed)]
        for name, each in ratios.items() if each
    ]  # fmt: skip
    console.put_table((f"speed-up over {told[0].against}", *(f"{tokens} tokens" for tokens in timed)), rows)


def _line(row: Row, has_sts: bool, has_ndcg: bool, timed: list[int]) -> list[str]:
    """Format a row of the card as a line of the table, with a dash for each missing figure."""
    measures = row.measures
    figures = ["-"] * 4
    if measures is not None:
        figures = [
            f"{measures.centred_cosine_mean:.5f}",
            f"{measures.centred_cosine_min:.5f}",
            f"{measures.regret_mean:.5f}",
            f"{measures.spearman:.5f}",
        ]
    figures += [_figure(row.sts_spearman)] * has_sts + [_figure(row.ndcg_at_10)] * has_ndcg
    medians = {time.tokens: f"{time.latency.p50_ms:.2f}" for time in row.latency}
    size = "-" if row.size_bytes is None else console.megabytes(row.size_bytes)
    scheme = "-" if row.bundle is None else row.bundle.scheme
    return [row.name, scheme, *figures, *(medians.get(tokens, "-") for tokens in timed), size, row.ran_on]


def _figure(value: float | None) -> str:
    """Format a figure, or a dash where it is missing."""
    return "-" if value is None else f"{value:.4f}"
