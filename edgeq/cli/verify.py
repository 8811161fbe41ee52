"""Run the verb `verify`: check a bundle's bytes, its chain of records and its golden texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeq.cli import console
from edgeq.errors import ConfigError


def verify(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="OUT/TARGET, as `edgeq export` wrote it, or a release's archive.")
    ],
    public_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check an archive's signature with it (PEM or minisign).")
    ] = None,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Hash every file of BUNDLE, walk its chain of records, and run its golden texts here.

    Raises:
        ConfigError: a public key is given for what is no archive.
    """
    from edgeq.bundle.verify import verify as verify_bundle
    from edgeq.release.archives import verify_archive

    if bundle.is_file():
        found = verify_archive(bundle, public_key)
    elif public_key is not None:
        raise ConfigError(f"{bundle}: is no archive, and only archives are signed. Leave --public-key out.")
    else:
        found = verify_bundle(bundle)
    if as_json:
        console.put_json(found.model_dump(mode="json"))
        return
    if found.max_abs_error is not None:
        told = f"the same vectors on {found.machine} ({found.ran_on}; max abs error {found.max_abs_error:.1e})"
    elif found.float32_cosine_min is not None:
        told = f"centred cosine {found.float32_cosine_min:.6f} with FP32 or more on {found.machine} ({found.ran_on})"
    else:
        told = "no vectors, because they were not run"
        console.note(f"not run: {found.reason}")
    whole = f"{found.files} files are whole" if public_key is None else f"signed, {found.files} files are whole"
    console.put(
        f"{found.path}: {whole}, the chain holds, and {found.golden_texts} golden texts give "
        f"{told}. The bundle for {found.target} is recorded as {found.status}."
    )
