"""Every file of tests/hostile is refused with a sentence: no traceback, no hang, nothing written outside."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tiny_bundle import TinyBackend, make_bundle

from edgeq.backends.openvino.ir import read_ir
from edgeq.backends.registry import BACKENDS
from edgeq.bundle.checksums import write_sums
from edgeq.bundle.golden import read_golden
from edgeq.bundle.manifest import load_manifest, load_report
from edgeq.bundle.verify import verify
from edgeq.data.tokenizer import Tokenizer
from edgeq.devices.report import parse_report
from edgeq.errors import BundleCorrupt, ConfigError, EdgeqError
from edgeq.release.unpack import unpack
from edgeq.system import files, untrusted
from edgeq.targets import load_target

HOSTILE = Path(__file__).resolve().parent / "hostile"
LONGEST_S, MOST_BYTES = 5.0, 64 << 20

ARCHIVES = {
    "parent.tar.zst": "could lie outside of it",
    "absolute.tar.zst": "could lie outside of it",
    "symlink.tar.zst": "is a symbolic link",
    "hardlink.tar.zst": "is a hard link",
    "pipe.tar.zst": "no plain file",
    "device.tar.zst": "no plain file",
    "twice.tar.zst": "twice",
    "letters.tar.zst": "twice",
    "file-and-folder.tar.zst": "as a file and as a folder",
    "two-tops.tar.zst": "one folder is needed",
    "backslash.tar.zst": "a backslash",
    "control.tar.zst": "cannot be printed",
    "extension.tar.zst": "no plain file",
    "extension-endless.tar.zst": "no plain file",
    "size-negative.tar.zst": "more than the",
    "size-huge.tar.zst": "more than the",
    "sparse.tar.zst": "no plain file",
    "bomb.tar.zst": "more than the",
    "behind.tar.zst": "there is more behind it",
    "window.tar.zst": "cannot be decompressed",
    "empty.tar.zst": "one folder is needed",
    "parent.zip": "could lie outside of it",
    "absolute.zip": "could lie outside of it",
    "drive.zip": "a colon",
    "symlink.zip": "no plain file",
    "folder.zip": "no plain file",
    "letters.zip": "twice",
    "comment.zip": "one folder is needed",
    "encrypted.zip": "encrypted",
    "bomb.zip": "more than the",
    "lying.zip": "is damaged|longer than it says",
    "count.zip": "at most 10,000",
    "text.zip": "neither a",
}
MODELS = {
    "parent.onnx": "could lie outside",
    "absolute.onnx": "could lie outside",
    "branch.onnx": "could lie outside",
    "context.onnx": "could lie outside",
    "text.onnx": "no ONNX file",
}
NETWORKS = {"laughs.xml": "document type", "outside.xml": "document type", "numbers.xml": "not a readable"}


@pytest.fixture(autouse=True)
def _bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hold each test to time and memory, and to its own folder."""
    monkeypatch.setitem(BACKENDS, "tiny", TinyBackend())  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("/tmp/edgeq-escaped").exists()
    assert not (tmp_path / "unpickled").exists()
    assert not [path for path in tmp_path.parent.glob("escaped*")]


def refused(act, kind: type[EdgeqError], said: str) -> None:  # type: ignore[no-untyped-def]
    """Assert that something is refused with a sentence, soon, and without taking memory first."""
    tracemalloc.start()
    begun = time.monotonic()
    try:
        with pytest.raises(kind) as caught:
            act()
        assert time.monotonic() - begun < LONGEST_S
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert re.search(said, str(caught.value)), caught.value
    assert str(caught.value).isprintable() or "\n" in str(caught.value)


def listed(folder: str) -> set[str]:
    return {path.name for path in (HOSTILE / folder).iterdir()}


def load_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hostile_make", HOSTILE / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_has_its_test() -> None:
    assert listed("archives") == set(ARCHIVES)
    assert listed("models") == {*MODELS, *NETWORKS}


@pytest.mark.release
def test_the_script_makes_these_files() -> None:
    made = {path.relative_to(HOSTILE).as_posix() for path in HOSTILE.glob("*/*.*") if path.parent.name != "__pycache__"}
    assert made == set(load_maker().FILES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.release) if name.endswith("zst") else name for name in ARCHIVES]
)
def test_a_hostile_archive_is_refused_and_writes_nothing_outside(tmp_path: Path, name: str) -> None:
    place = tmp_path / "deep" / "below" / "place"
    place.mkdir(parents=True)
    refused(lambda: unpack(HOSTILE / "archives" / name, place), BundleCorrupt, ARCHIVES[name])
    others = [path for path in tmp_path.rglob("*") if not path.is_relative_to(place)]
    assert [path for path in others if not place.is_relative_to(path)] == []
    assert not [path for path in place.rglob("*") if path.is_symlink() or path.is_fifo()]


@pytest.mark.parametrize("name", sorted(listed("golden")))
def test_hostile_golden_files_are_refused(tmp_path: Path, name: str) -> None:
    path, _ = make_bundle(tmp_path / "out")
    own = "golden.npz" if name.endswith(".npz") else "golden.jsonl"
    shutil.copy(HOSTILE / "golden" / name, path / own)
    if name == "not-finite.npz":
        (path / "golden.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    refused(lambda: read_golden(path), BundleCorrupt, own)


@pytest.mark.parametrize("name", sorted(listed("records")))
def test_hostile_records_are_refused(tmp_path: Path, name: str) -> None:
    path, _ = make_bundle(tmp_path / "out")
    content = (HOSTILE / "records" / name).read_bytes()
    refused(lambda: parse_report(content, "report.json", path), BundleCorrupt, r"report\.json")
    for own, read in (("parity.json", load_report), ("manifest.json", load_manifest)):
        (path / own).write_bytes(content)
        refused(lambda read=read: read(path), BundleCorrupt, re.escape(own))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_that_read_outside_are_refused(name: str) -> None:
    refused(lambda: untrusted.require_confined(HOSTILE / "models" / name), ConfigError, MODELS[name])


@pytest.mark.release
def test_a_model_may_not_read_outside_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"1234")
    (tmp_path / "model").mkdir()
    model = tmp_path / "model" / "model.onnx"
    model.write_bytes(load_maker().onnx_file("weights.bin"))
    (tmp_path / "model" / "weights.bin").write_bytes(b"1234")
    untrusted.require_confined(model)
    (tmp_path / "model" / "weights.bin").unlink()
    (tmp_path / "model" / "weights.bin").symlink_to(tmp_path / "secret")
    refused(lambda: untrusted.require_confined(model), ConfigError, "a link to outside")


@pytest.mark.parametrize("name", ["parent.onnx", "absolute.onnx", "branch.onnx"])
def test_a_model_that_is_given_may_not_read_outside_either(name: str) -> None:
    from edgeq.frontend.onnx import read as reading

    refused(lambda: reading.read(HOSTILE / "models" / name), ConfigError, "could lie outside")


def test_a_runtime_is_not_given_a_model_that_reads_outside(tmp_path: Path) -> None:
    from edgeq.backends import onnxruntime
    from edgeq.records import FileRef

    path, manifest = make_bundle(tmp_path / "out")
    shutil.copy(HOSTILE / "models" / "parent.onnx", path / "onnx" / "model.onnx")
    file = FileRef(path="onnx/model.onnx", sha256="0" * 64, size_bytes=1)
    artifact = manifest.artifact.model_copy(update={"files": (file,)})
    refused(lambda: onnxruntime.load(artifact, path, manifest.target), ConfigError, "could lie outside")


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_hostile_networks_are_refused(name: str) -> None:
    refused(lambda: read_ir(HOSTILE / "models" / name), ConfigError, NETWORKS[name])


@pytest.mark.parametrize("name", sorted(listed("targets")))
def test_hostile_targets_are_refused(name: str) -> None:
    stem = name.removesuffix(".toml")
    refused(lambda: load_target(stem, HOSTILE / "targets"), ConfigError, re.escape(name))


@pytest.mark.parametrize("name", sorted(listed("tokenizers")))
def test_hostile_tokenizers_are_refused(name: str) -> None:
    file = HOSTILE / "tokenizers" / name
    refused(lambda: Tokenizer.from_file(file, 16).encode(["a b", "c"]), ConfigError, "no tokenizer that works")


@pytest.mark.parametrize("place", ["../outside", "/etc/passwd", "onnx/../../outside", "a\\b", "a\nb", "C:model", ""])
@pytest.mark.parametrize("record", ["artifact", "parity", "golden"])
def test_a_manifest_may_not_name_a_file_outside(tmp_path: Path, record: str, place: str) -> None:
    import json

    path, _ = make_bundle(tmp_path / "out")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    part = manifest[record]["files"][0] if record == "artifact" else manifest[record]
    (part["vectors"] if record == "golden" else part)["path"] = place
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    refused(lambda: load_manifest(path), BundleCorrupt, "is not in the bundle")


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_a_bundle_with_links_or_pipes_is_refused(tmp_path: Path, kind: str) -> None:
    path, _ = make_bundle(tmp_path / "out")
    (tmp_path / "out" / "modules.json").write_bytes((path / "modules.json").read_bytes())
    (path / "modules.json").unlink()
    if kind == "link":
        (path / "modules.json").symlink_to(tmp_path / "out" / "modules.json")
    elif kind == "folder":
        (path / "modules").symlink_to(tmp_path)
    else:
        os.mkfifo(path / "modules.json")
    refused(lambda: verify(path), BundleCorrupt, "no plain file but a link or a device")


@pytest.mark.parametrize("name", ["manifest.json", "parity.json", "golden.npz", "golden.jsonl", "SHA256SUMS"])
def test_what_is_larger_than_it_may_be_is_not_read(tmp_path: Path, name: str) -> None:
    path, _ = make_bundle(tmp_path / "out")
    with (path / name).open("r+b") as file:
        file.truncate(5 << 30)  # sparse: it takes no room
    if name == "manifest.json":
        refused(lambda: load_manifest(path), BundleCorrupt, "5,368,709,120 bytes; at most")
    elif name == "parity.json":
        refused(lambda: load_report(path), BundleCorrupt, "5,368,709,120 bytes; at most")
    elif name == "SHA256SUMS":
        refused(lambda: verify(path), BundleCorrupt, "5,368,709,120 bytes; at most")
    else:
        refused(lambda: read_golden(path), BundleCorrupt, "5,368,709,120 bytes; at most")


def test_a_pipe_in_the_place_of_a_record_does_not_hang(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")
    refused(lambda: load_manifest(path), EdgeqError, "manifest.json")


UNPICKLERS = {"pickle", "cPickle", "joblib", "shelve", "marshal", "dill", "cloudpickle", "yaml"}
NUMPY_FILES = {"load", "save", "savez", "savez_compressed"}


def unpickles(node: ast.AST) -> bool:
    """Tell whether a piece of Python may run what a file holds."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
        return any(name.partition(".")[0] in UNPICKLERS for name in names)
    if not isinstance(node, ast.Call):
        return False
    said = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
    function = ast.unparse(node.func)
    if function in ("eval", "exec"):
        return True
    if function.startswith(("np.", "numpy.")) and function.rpartition(".")[2] in NUMPY_FILES:
        return said.get("allow_pickle") is not False
    return function == "torch.load" and said.get("weights_only") is not True


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import x", "eval(x)", "np.load(x)", "np.save(x)", "torch.load(x)"],
)
def test_what_unpickles_is_recognised(line: str) -> None:
    assert any(unpickles(node) for node in ast.walk(ast.parse(line)))


def test_nothing_in_edgeq_unpickles() -> None:
    """numpy unpickles only where it is told to, and writes pickles unless it is told not to."""
    for path in sorted(Path(files.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert [ast.unparse(node) for node in ast.walk(tree) if unpickles(node)] == [], path.name


def test_sums_of_a_bundle_are_written_over_plain_files(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    write_sums(path)
    assert verify(path).files
