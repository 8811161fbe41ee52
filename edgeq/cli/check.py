"""Run the verb `check`: apply the rules of targets to a model before anything is converted."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeq.cli import console
from edgeq.cli.arguments import TrustRemoteCode
from edgeq.cli.targets import TargetsDir


def check(
    model: Annotated[str, typer.Argument(help="What `export` takes, or the ONNX file of a float model.")],
    target: Annotated[list[str], typer.Option(help="What to check for; repeatable. `edgeq targets` lists them.")],
    pooling: Annotated[str | None, typer.Option(help="How to pool a model that does not say it.")] = None,
    tower: Annotated[str | None, typer.Option(help="Which tower of a model of both: text or image.")] = None,
    trust_remote_code: TrustRemoteCode = None,
    directory: TargetsDir = None,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Say what becomes of each operator of MODEL on each target, before anything is calibrated or converted.

    Raises:
        Unsupported: an operator or a setting is refused, or more operators stay on the host than the gate allows.
    """
    from edgeq.pipeline import check as checking
    from edgeq.system.cache import Cache
    from edgeq.targets import load_target

    chosen = tuple(load_target(name, directory) for name in dict.fromkeys(target))
    found = checking.check(model, chosen, pooling, Cache(), tower, trust_remote_code)
    if as_json:
        console.put_json({"checks": [item.model_dump(mode="json") for item in found]})
    else:
        for item in found:
            rows = [[line.operator, str(line.count), line.verdict, line.why] for line in item.operators]
            console.put_table(("operator", "nodes", item.target, "why"), rows)
    for item in found:
        for problem in item.possible_problems:
            console.note(f"{item.target}: may be refused for the ranges of your texts: {problem}")
    checking.require(found)
