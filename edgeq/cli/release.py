"""Run the verb `release`: pack bundles into archives."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from edgeq.cli import console


class ArchiveFormat(StrEnum):
    """Name the format of archives."""

    TAR_ZST = "tar.zst"
    ZIP = "zip"


def release(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Bundles, or the folders of exports that hold some.")
    ],
    version: Annotated[str, typer.Option(metavar="X.Y.Z", help="The version of the release.")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the release.")],
    archive_format: Annotated[
        ArchiveFormat, typer.Option("--format", help="The kind of archive.")
    ] = ArchiveFormat.TAR_ZST,
    previous: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The release before, for the notes to compare with.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Sign with this secret key (PEM or minisign); else EDGEQ_RELEASE_KEY may hold one. Its passphrase is "
            "taken from EDGEQ_RELEASE_PASSPHRASE.",
        ),
    ] = None,
    model_licence: Annotated[
        str | None, typer.Option(metavar="SPDX", help="The model's licence, for the bill of materials.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another release in DIR.")] = False,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Pack bundles that are fit for it into archives, with sums, bills of materials, provenance, signatures and notes.

    Raises:
        ReleaseRefused: a bundle is not fit; every reason is given.
    """
    from edgeq.release.make import release as release_bundles

    with console.stages() as progress:
        made = release_bundles(
            bundles, version, to, archive_format=archive_format.value, previous=previous, key=key,
            model_licence=model_licence, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    if as_json:
        console.put_json(made.model_dump(mode="json"))
        return
    rows = [[file.path, console.megabytes(file.size_bytes), file.sha256] for file in made.archives]
    console.put_table(("archive", "size", "sha256"), rows)
    told = "signed" if made.is_signed else "not signed (give --key)"
    was_there = "" if made.is_new else ", which was there already and is whole"
    console.put(f"{made.path}: release {made.version} of {len(rows)} bundles{was_there}; {told}")
