"""Run the verb `doctor`: list the toolchains that are installed or missing."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeq.cli import console


def doctor(
    install: Annotated[
        str | None, typer.Option(metavar="NAME", help="Make the environment of this toolchain, from its pins, first.")
    ] = None,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Say which toolchains are installed, and what each missing one needs; --install makes one that lives apart."""
    from edgeq.backends import doctor as examining

    toolchains = (examining.install(install),) if install is not None else examining.examine()
    if as_json:
        console.put_json({"toolchains": [toolchain.model_dump(mode="json") for toolchain in toolchains]})
        return
    rows = [
        [
            toolchain.name,
            ", ".join(f"{name} {version}" for name, version in toolchain.versions.items()) or "-",
            toolchain.install or "nothing is missing",
            toolchain.purpose,
        ]
        for toolchain in toolchains
    ]
    console.put_table(("toolchain", "found", "needs", "for"), rows)
