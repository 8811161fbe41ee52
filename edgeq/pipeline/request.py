"""Hold the options of one export, and write the command line that repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeq.frontend.onnx.find import OnnxOptions
from edgeq.records import Target
from edgeq.system.cache import Cache


@dataclass(frozen=True)
class ExportRequest:
    """Hold the options of `edgeq export`, one field for each."""

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
    onnx: OnnxOptions = OnnxOptions()
    samples: int | None = None
    seed: int = 0
    scheme: Path | None = None
    hidden_state: bool = True
    float_ops: tuple[str, ...] = ()
    keep_failed: bool = False
    overwrite: bool = False
    dry_run: bool = False


def command(request: ExportRequest, name: str, target: Target) -> tuple[str, ...]:
    """Give the command line that makes one target's bundle again: the options that decide its content, in fixed order.

    Files have bare names: paths of this machine would make equal bundles differ.

    Args:
        request: of the whole export.
        name: of the source.
        target: of the bundle.
    """
    words = ["edgeq", "export", name, "--target", target.name]
    optional: Mapping[str, object | None] = {
        "--texts": request.texts and request.texts.name, "--column": request.column,
        "--images": request.images and request.images.name, "--tower": request.tower,
        "--validation": request.validation and request.validation.name,
        "--pooling": request.pooling, "--dim": request.dim,
        "--tokenizer": request.onnx.tokenizer and request.onnx.tokenizer.name,
        "--max-sequence": request.onnx.max_sequence, "--scheme": request.scheme and request.scheme.name,
        "--samples": request.samples, "--seed": request.seed or None,
    }  # fmt: skip
    for option, value in optional.items():
        words += [option, str(value)] if value is not None else []
    words += [word for name in request.float_ops for word in ("--float-op", name)]
    if request.onnx.normalize is not None:
        words.append("--normalize" if request.onnx.normalize else "--no-normalize")
    return (*words, *(() if request.hidden_state else ("--no-hidden-state",)))
