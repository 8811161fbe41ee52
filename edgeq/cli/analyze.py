"""Run the verb `analyze`: rank weight MatMuls by the quality that int8 costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeq.cli import console
from edgeq.cli.arguments import TrustRemoteCode
from edgeq.cli.targets import TargetsDir

if TYPE_CHECKING:
    from edgeq.analysis.scheme_search import Analysis, Cost

_SHOWN = 12


def analyze(
    model: Annotated[str, typer.Argument(help="As `edgeq export` takes it.")],
    target: Annotated[str, typer.Option(help="Whose scheme and runtime are looked into.")],
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts to calibrate on: .txt, .jsonl, .csv.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column of --texts that holds the text.")] = None,
    validation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts to compare on; else 20 % of --texts.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="How to pool a model that does not say it.")] = None,
    tower: Annotated[str | None, typer.Option(help="Of a model of texts and images: text.")] = None,
    trust_remote_code: TrustRemoteCode = None,
    samples: Annotated[int | None, typer.Option(min=1, metavar="N", help="Calibrate on N of the texts.")] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Which N texts.")] = 0,
    cost: Annotated[
        bool, typer.Option("--cost/--no-cost", help="Price each shape: bytes and milliseconds of real artifacts.")
    ] = True,
    auto: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Find the cheapest scheme that holds the gate, for `edgeq export --scheme`."),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Neither read nor keep intermediate results.")] = False,
    directory: TargetsDir = None,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Rank MODEL's weight products by what their integer codes cost, with what mending each costs."""
    from edgeq.analysis import scheme_search
    from edgeq.pipeline.request import ExportRequest
    from edgeq.reports import card_page
    from edgeq.system import files
    from edgeq.system.cache import Cache
    from edgeq.targets import load_target

    if auto is not None:
        card_page.require(auto)
    store = Cache.temporary() if no_cache else Cache()
    request = ExportRequest(
        model=model, targets=(load_target(target, directory),), out=Path(), texts=texts, column=column,
        validation=validation, pooling=pooling, tower=tower, trust_remote_code=trust_remote_code,
        samples=samples, seed=seed, cache=store,
    )  # fmt: skip
    try:
        with console.stages() as progress:
            found = scheme_search.analyze(scheme_search.AnalysisRequest(request, cost, auto is not None), progress)
    finally:
        store.close()
    if auto is not None and found.found is not None:
        files.write_bytes(auto, (found.found.model_dump_json(indent=2) + "\n").encode())
    if as_json:
        console.put_json(found.model_dump(mode="json"))
        return
    _put(found)
    if auto is not None and found.found is not None:
        count = len(found.found.promoted)
        said = f"the gate holds with {count} products promoted" if count else "the gate holds as it is"
        console.put(f"{auto}: {found.found.name}: {said}")


def _put(found: Analysis) -> None:
    """Print the ranking, the effect of keeping several products at higher precision, and the trials."""
    sensitivity = found.sensitivity
    prices = {(item.channels, item.outputs): item for item in found.costs}
    console.put(
        f"{found.target}: scheme {sensitivity.scheme}, {sensitivity.texts} texts: loss (1 - mean cosine, centred) "
        f"{sensitivity.loss:.5f}, of which {sensitivity.rest:.5f} stays with all products promoted"
    )
    rows = []
    for rank, item in enumerate(sensitivity.sites[:_SHOWN], start=1):
        price = prices.get((item.channels, item.outputs))
        rows.append([str(rank), "\n".join(item.names), f"{item.loss:.5f}", *_price(price)])
    console.put_table(("", "products that read one tensor", "loss", "bytes", "ms"), rows)
    left = len(sensitivity.sites) - len(rows)
    console.put(f"promoting products: {found.change}" + (f"; {left} more with --json" if left > 0 else ""))
    steps = [[str(step.promoted), f"{step.loss:.5f}"] for step in sensitivity.steps]
    console.put_table(("promoted together", "loss"), steps)
    if found.trials:
        trials = [
            [str(len(trial.promoted)), trial.status, *_measured(trial.measures), console.megabytes(trial.size_bytes)]
            for trial in found.trials
        ]
        console.put_table(("artifact with", "gate", "centred cosine mean", "min", "size"), trials)
    reason = next((item.reason for item in found.costs if item.reason), None)
    if reason:
        console.put(f"no times: {reason}")


def _price(price: Cost | None) -> list[str]:
    if price is None:
        return ["-", "-"]
    time = "-" if price.extra_ms is None else f"{price.extra_ms:+.3f}"
    if price.extra_ms_interval is not None:
        low, high = price.extra_ms_interval
        time += f" [{low:+.3f}, {high:+.3f}]"
    return [f"{price.extra_bytes:+,}", time]


def _measured(measures: object) -> list[str]:
    from edgeq.records import Measures

    if not isinstance(measures, Measures):
        return ["-", "-"]
    return [f"{measures.centred_cosine_mean:.5f}", f"{measures.centred_cosine_min:.5f}"]
