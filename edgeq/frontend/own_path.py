"""Compare a float model and its tokenizer with the source's own path, which ran in a process with torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edgeq.data import end_to_end
from edgeq.data.end_to_end import Distance, OwnPath
from edgeq.data.sessions import embed_batches
from edgeq.data.text_input import TextInput
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import batches
from edgeq.frontend import tokenizer_config
from edgeq.frontend.locate import Located
from edgeq.frontend.onnx.find import OnnxFile
from edgeq.frontend.torch import own_path
from edgeq.graph.float_session import FloatSession
from edgeq.records import Source

_BATCH_TOKENS = 512  # few: a batch is padded to its longest text, and most texts are short
_known: dict[tuple[object, ...], OwnPath] = {}  # several graphs may share a tokenizer


def of(located: Located, raw_dir: Path) -> tuple[OwnPath, own_path.Vectors]:
    """Give the ids and vectors of a source's own path, or the reason why there are none.

    Args:
        located: the model.
        raw_dir: where the process with torch wrote them.
    """
    if located.onnx is not None:
        return _of_tokenizer(located.onnx), {}
    if located.takes_images:
        return end_to_end.without("images have no token ids; their pixels are compared with the processor's own"), {}
    return own_path.read(raw_dir)


def compare(found: tuple[OwnPath, own_path.Vectors], source: Source, config_dir: Path, model: Path) -> None:
    """Compare token ids and FP32's vectors with those of the source's own path, and store its ids beside the tokenizer.

    Args:
        found: as `of` gives it.
        source: the record.
        config_dir: the folder with tokenizer.json.
        model: the float model's ONNX file.

    Raises:
        ParityFailed: a text has other ids, or another vector.
    """
    own, vectors = found
    end_to_end.write(own, config_dir)
    end_to_end.require_same(end_to_end.compare(config_dir, source, source.max_sequence), source.name)
    if not vectors:
        return
    inputs = TextInput(Tokenizer.from_file(config_dir / "tokenizer.json", source.max_sequence), source)
    session = FloatSession.of(model)
    distances: list[Distance] = []
    for method, rows in vectors.items():
        tokens = inputs.tokens([own.texts[row] for row in rows], method)
        made = embed_batches(session, batches(tokens, max_tokens=_BATCH_TOKENS), len(tokens))
        distances += [end_to_end.distance(method, row, mine, rows[row]) for row, mine in zip(rows, made, strict=True)]
    end_to_end.write(end_to_end.with_distances(own, distances), config_dir)
    end_to_end.require_same(end_to_end.compare(config_dir, source, source.max_sequence), source.name)


def _of_tokenizer(file: OnnxFile) -> OwnPath:
    """Run transformers' tokenizer of the folder beside an ONNX file, in a process of its own, once for equal files."""
    if file.config_dir is None or not (file.config_dir / tokenizer_config.FILE).is_file():
        return end_to_end.without(f"no {tokenizer_config.FILE} lies beside the ONNX file's tokenizer.json")
    wanted = (file.max_sequence, *sorted((item.name, item.file.sha256) for item in file.files))
    if wanted not in _known:
        _known[wanted] = _run_tokenizer(file.config_dir, file.max_sequence)
    return _known[wanted]


def _run_tokenizer(folder: Path, limit: int) -> OwnPath:
    child = subprocess.run(
        [sys.executable, "-m", "edgeq.frontend.torch.own_path", str(folder), str(limit)],
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if child.returncode != 0:
        last = (child.stderr.strip() or "no message").splitlines()[-1].replace(str(folder), "its folder")
        return end_to_end.without(f"transformers' tokenizer cannot be loaded here ({last})")
    return OwnPath.model_validate_json(child.stdout.rstrip("\n").rpartition("\n")[2])
