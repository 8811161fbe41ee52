"""Run the verb `targets`: list the targets, or show one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeq.cli import console
from edgeq.errors import ToolMissing

if TYPE_CHECKING:
    from edgeq.records import Target

TargetsDir = Annotated[
    Path | None, typer.Option("--targets", metavar="DIR", help="Read target files from here, not edgeq's own.")
]


def targets(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this target in full.")] = None,
    directory: TargetsDir = None,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """List the targets and whether this machine can run them, or show one."""
    from edgeq.targets import list_targets, load_target

    if name is not None:
        target = load_target(name, directory)
        console.put_json({"targets": [_listed(target)]}) if as_json else console.put(target.model_dump_json(indent=2))
        return
    listed = [_listed(target) for target in list_targets(directory)]
    if as_json:
        console.put_json({"targets": listed})
        return
    rows = [
        [item["name"], item["backend"], item["scheme"], _spell(item["runs_on"]), item["reason"] or "yes"]
        for item in listed
    ]
    console.put_table(("target", "backend", "scheme", "runs on", "available here"), rows)


def _listed(target: Target) -> dict[str, Any]:
    """Describe a target as `targets --json` does, with the reason why this machine cannot run it."""
    from edgeq.backends.contract import obstacle
    from edgeq.backends.registry import find
    from edgeq.targets import availability

    is_available, reason = availability(target)
    backend = find(target.backend, target.name)
    try:
        backend.tools()
        missing = obstacle(backend, target)
    except ToolMissing as error:
        missing = str(error)
    if missing is not None:
        is_available, reason = False, "; ".join(filter(None, (reason, missing)))
    return {
        "name": target.name,
        "backend": target.backend,
        "scheme": target.scheme,
        "runs_on": target.runs_on.model_dump(mode="json"),
        "available": is_available,
        "reason": reason or None,
    }


def _spell(runs_on: dict[str, Any]) -> str:
    """Describe the machine that a target needs in a few words."""
    words = [runs_on["machine"], *runs_on["cpu_flags_all"]]
    if runs_on["cpu_flags_any"]:
        words.append(" or ".join(runs_on["cpu_flags_any"]))
    return ", ".join(words)
