"""Define `edgeq.export`: the verb `export` for Python callers, with models, texts and tokenizers in memory, too."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.errors import ConfigError
from edgeq.frontend.onnx.find import OnnxOptions, stated_limit, tokenizer_file
from edgeq.pipeline import export as pipeline
from edgeq.pipeline.bundling import Exported
from edgeq.pipeline.request import ExportRequest
from edgeq.records import Target
from edgeq.system import files
from edgeq.system.cache import Cache
from edgeq.system.progress import Progress, silent
from edgeq.targets import load_target

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

_MODULE_LIMIT = 512  # tokens, where neither the caller nor the tokenizer says more


def export(
    model: str | Path | torch.nn.Module,
    targets: Sequence[str | Target],
    out: str | Path,
    texts: Sequence[str] | str | Path | None = None,
    *,
    images: str | Path | None = None,
    validation: Sequence[str] | str | Path | None = None,
    pooling: str | None = None,
    dim: int | None = None,
    tower: str | None = None,
    trust_remote_code: bool | None = None,
    normalize: bool | None = None,
    tokenizer: str | Path | Any | None = None,
    max_sequence: int | None = None,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor] | None = None,
    column: str | None = None,
    evaluation: Sequence[str | Path] = (),
    samples: int | None = None,
    seed: int = 0,
    scheme: str | Path | None = None,
    promote: bool = True,
    hidden_state: bool = True,
    keep_failed: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> tuple[Exported, ...]:
    """Export a model to one verified bundle for each target, with the options of `edgeq export`.

    Args:
        model: a directory, an ONNX file, a hub id in the local cache, a packaged name, or a torch module that takes
            token ids and mask.
        targets: names as `edgeq targets` lists them, or targets that `edgeq.targets.load_target` read.
        out: bundles go to OUT/TARGET.
        texts: to calibrate on: a list, or a .txt, .jsonl or .csv file; None takes the default set.
        images: a folder of images to calibrate on, for a model of images.
        validation: to measure parity on, in the same forms; None takes a fifth of `texts` or `images`.
        pooling: from token vectors to one vector, where the model's files do not name it.
        dim: keep the first so many dimensions, L2-normalised where the model normalises; not of ONNX files or modules.
        tower: "text" or "image", of a model that embeds both.
        trust_remote_code: True runs the model's own code, in the child process that holds torch; False takes
            transformers' classes in its place; None refuses a model that has some.
        normalize: of an ONNX file or a module: L2-normalise its vectors.
        tokenizer: of an ONNX file or a module: a tokenizer.json, the folder that holds it, or a tokenizer of
            `tokenizers` or `transformers`.
        max_sequence: of an ONNX file or a module: its longest text in tokens.
        example_inputs: of a module: tensors for `forward`, by position or name.
        column: of text files.
        evaluation: files whose texts must not be calibrated on.
        samples: calibrate on so many of the texts, chosen at random.
        seed: of that choice.
        scheme: a file written by `edgeq analyze --auto`.
        promote: where a gate is missed, promote weight products to 16-bit activations until it holds.
        hidden_state: keep the output last_hidden_state.
        keep_failed: write a bundle that misses its gate, and return its result instead of raising.
        overwrite: replace a bundle made from other inputs.
        dry_run: check everything, convert nothing.
        cache: for intermediate results; None takes the user's default cache.
        progress: called as `progress(stage, done, total)`.

    Returns:
        One result for each target, in order.

    Raises:
        ParityFailed: an artifact's vectors miss the gate of its target, and `keep_failed` is not set.
        EdgeqError: any other failure; see `edgeq.errors`.
    """
    if isinstance(targets, str):
        raise ConfigError(f'export: targets is the string {targets!r}; a list is needed. Write targets=["{targets}"].')
    if not isinstance(targets, Iterable):
        raise ConfigError(f"export: targets is of type {type(targets).__name__}; a list of names is needed.")
    with files.work_dir() as folder:
        options = OnnxOptions(_tokenizer(tokenizer, folder), max_sequence, normalize)
        if isinstance(model, str | Path):
            if example_inputs is not None:
                raise ConfigError("export: example_inputs belong to a torch module; leave them out")
            name = str(model)
        else:
            name, options = _module(model, example_inputs, options, folder)
        request = ExportRequest(
            model=name,
            targets=tuple(load_target(item) if isinstance(item, str) else item for item in targets),
            out=Path(out),
            texts=_texts(texts, folder / "texts.jsonl"),
            images=Path(images) if images is not None else None,
            column=column,
            validation=_texts(validation, folder / "validation.jsonl"),
            evaluation=tuple(map(Path, evaluation)),
            pooling=pooling,
            dim=dim,
            tower=tower,
            trust_remote_code=trust_remote_code,
            onnx=options,
            samples=samples,
            seed=seed,
            scheme=Path(scheme) if scheme is not None else None,
            promote=promote,
            hidden_state=hidden_state,
            keep_failed=keep_failed,
            overwrite=overwrite,
            dry_run=dry_run,
            cache=cache or Cache(),
        )
        results = pipeline.export(request, progress or silent)
    if not keep_failed:
        pipeline.require_passed(results)
    return results


def _texts(texts: Sequence[str] | str | Path | None, path: Path) -> Path | None:
    """Give the path of a file of texts; a list is written to `path` first."""
    if texts is None or isinstance(texts, str | Path):
        return Path(texts) if texts is not None else None
    if not isinstance(texts, Iterable) or isinstance(texts, bytes | Mapping):
        raise ConfigError(f"export: texts is of type {type(texts).__name__}; a list of strings or a path is needed.")
    texts = list(texts)  # an iterator can be read once
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigError(f"export: texts[{position}] is of type {type(text).__name__}; a string is needed.")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _tokenizer(tokenizer: str | Path | Any | None, folder: Path) -> Path | None:
    """Give the path of a tokenizer; one in memory is saved first."""
    if tokenizer is None or isinstance(tokenizer, str | Path):
        return Path(tokenizer) if tokenizer is not None else None
    path = folder / "tokenizer"
    path.mkdir()
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(path))
    elif hasattr(tokenizer, "save"):
        tokenizer.save(str(path / "tokenizer.json"))
    else:
        raise ConfigError(
            f"export: tokenizer is a {type(tokenizer).__name__}; a path, or a tokenizer of tokenizers or transformers "
            "is needed"
        )
    return path


def _module(
    model: Any, example_inputs: Sequence[Any] | Mapping[str, Any] | None, options: OnnxOptions, folder: Path
) -> tuple[str, OnnxOptions]:
    """Export a torch module to an ONNX file; give its path, and the options to read it with."""
    if not callable(model) or not hasattr(model, "state_dict"):
        raise ConfigError(f"export: model is a {type(model).__name__}; a path, a name or a torch.nn.Module is needed")
    from edgeq.frontend.torch import module

    if options.tokenizer is None:
        raise ConfigError(f"export: {type(model).__name__} is a module, and texts need its tokenizer; give tokenizer=")
    limit = options.max_sequence or stated_limit(tokenizer_file(options.tokenizer))
    if limit is None:
        limit = _MODULE_LIMIT
        _log.warning("export: nothing says how long a text may be; %d tokens are taken. Give max_sequence=.", limit)
    path = module.write_onnx(model, example_inputs, folder, limit)
    return str(path), replace(options, kind="module")
