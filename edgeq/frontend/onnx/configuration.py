"""Write what a bundle carries beside the graph of an ONNX file: its tokenizer, and files for sentence-transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from edgeq.frontend import tokenizer_config
from edgeq.frontend.onnx.find import CARRIED, CONFIG, MODULES, PROMPTS, TOKENIZER, OnnxFile, read_json
from edgeq.frontend.onnx.pooling_heads import FLAGS, Head
from edgeq.frontend.settings import ENCODER


def opens_in_sentence_transformers(file: OnnxFile, head: Head) -> bool:
    """Tell whether config.json and the pooling are known, which sentence-transformers needs to open a folder."""
    return file.config_dir is not None and (file.config_dir / CONFIG).is_file() and bool(head.modes)


def prompts(file: OnnxFile) -> tuple[dict[str, str], str | None]:
    """Read the prompts by name, and the name of the default one.

    Where there are any, "query" and "document" are among them, possibly empty, as in sentence-transformers.

    Raises:
        ConfigError: the file of prompts is not JSON.
    """
    config = read_json(file.config_dir / PROMPTS) if file.config_dir is not None else {}
    named = {"query": "", "document": ""}
    named |= {str(name): str(text or "") for name, text in config.get("prompts", {}).items()}
    return named if any(named.values()) else {}, config.get("default_prompt_name")


def write_configuration(file: OnnxFile, head: Head, width: int, folder: Path) -> None:
    """Write tokenizer, config and module files.

    Args:
        file: the ONNX file with its tokenizer and configuration.
        head: the modules behind the token vectors.
        width: of a token vector.
        folder: does not exist yet.

    Raises:
        ConfigError: modules.json is not JSON.
    """
    folder.mkdir()
    shutil.copyfile(file.tokenizer, folder / TOKENIZER)
    if file.config_dir is None:
        return
    for name in CARRIED:
        if (file.config_dir / name).is_file():
            shutil.copyfile(file.config_dir / name, folder / name)
    if not opens_in_sentence_transformers(file, head):
        return
    if (folder / tokenizer_config.FILE).is_file():
        tokenizer_config.mend(folder / tokenizer_config.FILE)
    given = read_json(file.config_dir / MODULES)
    dense = [str(entry["path"]) for entry in given if str(entry["type"]).endswith(".Dense")]
    entries: list[dict[str, object]] = []
    for name in ("Transformer", *(module.split(":")[0] for module in head.modules)):
        path = "" if name == "Transformer" else f"{len(entries)}_{name}"
        entries.append(
            {
                "idx": len(entries),
                "name": str(len(entries)),
                "path": path,
                "type": f"sentence_transformers.models.{name}",
            }  # fmt: skip
        )
        if name == "Pooling":
            flags: dict[str, object] = {flag: mode in head.modes for flag, mode in FLAGS.items()}
            pooling = {"word_embedding_dimension": width, **flags, "include_prompt": True}
            _write_json(folder / path / "config.json", pooling)
        elif name == "Dense":
            shutil.copytree(file.config_dir / dense.pop(0), folder / path)
    _write_json(folder / MODULES, entries)
    told = read_json(file.config_dir / ENCODER)
    lengths = {key: told[key] for key in ("query_length", "document_length") if told.get(key) is not None}
    _write_json(folder / ENCODER, {"max_seq_length": file.max_sequence, "do_lower_case": False} | lengths)


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
