"""Run the verb `embed`: turn texts or images into vectors."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeq.cli import console
from edgeq.cli.arguments import BundleDir
from edgeq.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Role(StrEnum):
    """Name the role of texts in a search."""

    QUERY = "query"
    DOCUMENT = "document"


def embed(
    bundle: BundleDir,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the vectors go, float32[texts, dim], as .npy.")],
    texts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Texts: .txt, .jsonl, .csv; - reads lines from standard input, the default."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Images, by name, for a bundle that embeds images.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column of --texts that holds the text.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The most texts run at once.")] = 32,
    prompt: Annotated[
        str | None, typer.Option(metavar="NAME", help="Put this of the model's prompts before each.")
    ] = None,
    role: Annotated[
        Role | None, typer.Option(help="What the texts are: the prompt that the model has for it goes before each.")
    ] = None,
    skip_blank: Annotated[
        bool, typer.Option("--skip-blank", help="Leave out texts that are blank, and list their rows beside --out.")
    ] = False,
    codec: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Write codes: int8, int4, binary, ..., or a codec.npz of an index."),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="0 leaves it to the target.")] = 0,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Turn texts or images into vectors with BUNDLE.

    Row i of the vectors is record i of the texts, blank ones included. With --skip-blank the blank ones are left out,
    and their numbers, from 0, stand in a file beside --out: vectors.npy has vectors.skipped.txt. With --codec the rows
    are codes instead of floats.

    Raises:
        ConfigError: the texts or images cannot be read or are not what BUNDLE takes, --out is no .npy file, all texts
            are blank and left out, or the prompt is not there or given twice.
    """
    from edgeq.bundle.load import load

    if out.suffix != ".npy":
        raise ConfigError(f"--out: {out} does not end in .npy, the format that is written. Rename it.")
    if prompt is not None and role is not None:
        raise ConfigError(f"--prompt {prompt}, --role {role}: both say what goes before each text. Give one of them.")
    if skip_blank and images is not None:
        raise ConfigError("--skip-blank: is for texts, and --images gives images. Leave it out.")
    chosen = _given(bundle, texts, images, column)
    skipped = [row for row, text in enumerate(chosen) if not text.strip()] if skip_blank else []
    if skipped:
        if len(skipped) == len(chosen):
            raise ConfigError(f"{texts or 'standard input'}: every record is blank, and --skip-blank leaves it out.")
        chosen = [text for text in chosen if text.strip()]
    loaded = load(bundle, threads)
    if codec is not None:
        loaded.codec(codec)  # one that is not there is told before anything runs
    encode = {None: loaded.encode, Role.QUERY: loaded.encode_query, Role.DOCUMENT: loaded.encode_document}[role]
    vectors = encode(chosen, batch_size=batch_size, prompt_name=prompt, codec=codec)
    _save(out, vectors)
    listed = _list_skipped(out, skipped) if skip_blank else None
    if as_json:
        kind = "texts" if images is None else "images"
        told: dict[str, object] = {"path": str(out), kind: vectors.shape[0], "dim": loaded.dim}
        if codec is not None:
            told |= {"codec": codec, "dtype": vectors.dtype.name, "columns": vectors.shape[1]}
        console.put_json(told if listed is None else told | {"skipped": len(skipped), "skipped_rows": str(listed)})
    else:
        console.put(str(out))


def _given(bundle: Path, texts: str | None, images: Path | None, column: str | None) -> list[str]:
    """Read texts, or list the paths of images.

    Raises:
        ConfigError: the bundle embeds the other kind, or the files cannot be read.
    """
    from edgeq.bundle.manifest import load_manifest
    from edgeq.data.batches import require_texts
    from edgeq.data.text_files import read_records
    from edgeq.pipeline.validate import require_kind

    manifest = load_manifest(bundle)
    if images is None:
        require_texts(manifest.float_model.inputs, bundle, "Give a folder with --images.")
        return _standard_input() if texts in (None, "-") else read_records(Path(texts), column)
    require_kind(manifest, bundle, None if texts is None else Path(texts), images)
    if column is not None:
        raise ConfigError(f"--column {column}: is for texts, and {bundle} takes images. Leave it out.")
    from edgeq.data.images import image_paths  # here: texts need no Pillow

    return [str(path) for path in image_paths(images)]


def _standard_input() -> list[str]:
    """Read texts from standard input, one per line, blank or not.

    Raises:
        ConfigError: the bytes are no UTF-8, or there are none.
    """
    from edgeq.data.text_files import lines_of

    data = typer.get_binary_stream("stdin").read()
    try:
        texts = lines_of(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"standard input, line {number}: byte {data[error.start]:#04x} is no UTF-8. Convert the text to UTF-8."
        ) from error
    if not texts:
        raise ConfigError("standard input: is empty; at least one line is needed. Give lines, or --texts FILE.")
    return texts


def _list_skipped(out: Path, rows: list[int]) -> Path:
    """Write the numbers of the records that were left out, from 0, a line each; give the file's path."""
    from edgeq.system.files import replacing

    path = out.with_suffix(".skipped.txt")
    with replacing(path) as partial:
        partial.write_text("".join(f"{row}\n" for row in rows), encoding="ascii")
    if rows:
        count = "1 blank record is" if len(rows) == 1 else f"{len(rows)} blank records are"
        console.note(f"{count} left out; the numbers, from 0, stand in {path}.")
    return path


def _save(out: Path, vectors: NDArray[np.float32]) -> None:
    """Write float32[texts, dim] as .npy, whole or not at all."""
    import numpy as np

    from edgeq.system.files import replacing

    with replacing(out) as partial, partial.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
