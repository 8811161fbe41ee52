"""Hold the options of `edgeq export`, and write the command that makes one of its bundles again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from edgeq.frontend.onnx.find import OnnxOptions
from edgeq.records import Target
from edgeq.system.cache import Cache


@dataclass(frozen=True)
class ExportRequest:
    """Hold what `edgeq export` was asked for; the fields are the options of the verb."""

    model: str
    targets: tuple[Target, ...]
    out: Path
    cache: Cache
    texts: Path | None = None
    column: str | None = None
    images: Path | None = None
    validation: Path | None = None
    evaluation: tuple[Path, ...] = ()
    pooling: str | None = None
    dim: int | None = None
    tower: str | None = None
    trust_remote_code: bool | None = None
    onnx: OnnxOptions = OnnxOptions()
    samples: int | None = None
    seed: int = 0
    scheme: Path | None = None
    promote: bool = True
    hidden_state: bool = True
    keep_failed: bool = False
    overwrite: bool = False
    dry_run: bool = False


# The options that decide a bundle's content: fields of `ExportRequest` and `OnnxOptions`, in the order of the command.
COMMAND_OPTIONS = (
    "texts", "column", "images", "tower", "validation", "pooling", "dim", "tokenizer", "max_sequence", "scheme",
    "promote", "samples", "seed", "normalize", "hidden_state", "trust_remote_code",
)  # fmt: skip
# The other fields: what the command names without an option, and what leaves a bundle's content as it is.
NOT_IN_COMMAND = frozenset(
    {"model", "targets", "out", "cache", "onnx", "kind", "evaluation", "keep_failed", "overwrite", "dry_run"}
)


def command(request: ExportRequest, name: str, target: Target) -> tuple[str, ...]:
    """Write the command that makes one bundle again: only the options that decide its content, in a fixed order.

    Files are written by their bare names: their folders mean nothing elsewhere, and would make equal bundles differ.

    Args:
        request: of the export.
        name: of the model, as its source record has it.
        target: of the bundle.
    """
    values = vars(request) | vars(request.onnx)
    defaults = {field.name: field.default for part in (request, request.onnx) for field in fields(part)}
    given = [option for option in COMMAND_OPTIONS if values[option] != defaults[option]]
    words = [word for option in given for word in _words(option, values[option])]
    return ("edgeq", "export", name, "--target", target.name, *words)


def _words(field: str, value: object) -> Iterator[str]:
    """Spell one option as the command line has it."""
    option = field.replace("_", "-")
    if isinstance(value, bool):
        yield f"--{option}" if value else f"--no-{option}"
    else:
        yield from (f"--{option}", value.name if isinstance(value, Path) else str(value))
