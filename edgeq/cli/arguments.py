"""Define the arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edgeq.records import Manifest

BundleDir = Annotated[Path, typer.Argument(metavar="BUNDLE", help="OUT/TARGET, as `edgeq export` wrote it.")]
Against = Annotated[
    Path | None,
    typer.Option("--against", metavar="FILE", help="The bundle's FP32 model; else it is looked for in the cache."),
]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code/--no-trust-remote-code",
        help="Run the code that the model brings along, in a process of its own; or take transformers' classes.",
    ),
]


def find_float_model(manifest: Manifest, against: Path | None) -> Path:
    """Find a bundle's FP32 model: the named file, or the one in the cache.

    Raises:
        ConfigError: it is not found, or is another model.
    """
    from edgeq.bundle.float_model import float_model
    from edgeq.system.cache import Cache

    return float_model(manifest, against, Cache().root)
