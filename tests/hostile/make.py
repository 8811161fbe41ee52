"""Make the hostile files of this folder, each small and wrong in one way: `python tests/hostile/make.py [FOLDER]`."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zstandard
from onnx import TensorProto, helper

TOP = "tiny-1.0.0-tiny-target"
GOOD = {f"{TOP}/manifest.json": b"{}", f"{TOP}/SHA256SUMS": b""}
EPOCH = (1980, 1, 1, 0, 0, 0)


def tar(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """Give a compressed tar file of harmless files and these entries."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=form) as archive:
        for name, data in GOOD.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for entry, data in entries:
            archive.addfile(entry, io.BytesIO(data))
    return compressed(plain.getvalue())


def compressed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=19).compress(data)


def file(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    entry.size = len(data) if kind == tarfile.REGTYPE else 0
    return entry, data if kind == tarfile.REGTYPE else b""


def raw_header(name: str, kind: bytes, size: bytes) -> bytes:
    """Give a tar header with any bytes as its size, its check sum right."""
    entry = tarfile.TarInfo(name)
    entry.type = kind
    block = bytearray(entry.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def zipped(edit: Callable[[zipfile.ZipFile], None], method: int = zipfile.ZIP_STORED) -> bytes:
    """Give a zip file of harmless files and what `edit` adds."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, data in GOOD.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), data)
        edit(archive)
    return made.getvalue()


def entry(name: str, mode: int = 0o100644) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name, EPOCH)
    made.create_system, made.external_attr = 3, mode << 16
    return made


def bomb_zip() -> bytes:
    """Give 300 MB of zeros in 300 kB."""
    made = entry(f"{TOP}/zeros")
    made.compress_type = zipfile.ZIP_DEFLATED
    return zipped(lambda archive: archive.writestr(made, bytes(100 << 20), compresslevel=9))


def lying_zip() -> bytes:
    """Give an archive whose directory says a stored file is shorter than what lies there."""
    data = bytearray(zipped(lambda archive: archive.writestr(entry(f"{TOP}/short"), b"0123456789")))
    place = data.rindex(b"PK\x01\x02")
    data[place + 24 : place + 28] = struct.pack("<I", 5)
    return bytes(data)


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


def npz(name: str, content: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """Give an .npz file with one array of any bytes, and the other arrays as they should be."""
    arrays = {
        "input_ids": np.ones((2, 3), np.int64), "attention_mask": np.ones((2, 3), np.int64),
        "reference": np.ones((2, 4), np.float32), "embeddings": np.ones((2, 4), np.float32), "pad_id": np.int64(0),
    }  # fmt: skip
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for each, array in arrays.items():
            plain = io.BytesIO()
            np.lib.format.write_array(plain, np.asarray(array), version=(1, 0))
            archive.writestr(
                zipfile.ZipInfo(f"{each}.npy", EPOCH), content if each == name else plain.getvalue(), method
            )
    return made.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    """Give an .npy file with any words as its header."""
    line = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(line)) + line + data


class Malice:
    """Leave a trace when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("unpickled", "w")


def object_npy() -> bytes:
    return npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps(np.array([Malice()], object)))


def onnx_file(location: str | None, *, where: str = "initializer") -> bytes:
    """Give an ONNX file that reads a file beside it: weights of a graph, of a branch in it, or a compiled binary."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location or ""), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    output = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, [1])
    nodes, stored = [helper.make_node("Identity", ["w"], ["sentence_embedding"])], [tensor]
    if where == "branch":
        constant = helper.make_node("Constant", [], ["inner"])
        constant.attribute.add(name="value", type=4).t.CopyFrom(tensor)
        branch = helper.make_graph([constant], "branch", [], [output])
        truth = helper.make_tensor("truth", TensorProto.BOOL, [], [True])
        nodes, stored = (
            [helper.make_node("If", ["truth"], ["sentence_embedding"], then_branch=branch, else_branch=branch)],
            [truth],
        )
    if where == "context":
        nodes, stored = [helper.make_node(
            "EPContext", [], ["sentence_embedding"], domain="com.microsoft", embed_mode=0, ep_cache_context=location, main_context=1
        )], []  # fmt: skip
    graph = helper.make_graph(nodes, "hostile", [], [output], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString(
        deterministic=True
    )


def tokenizer(vocabulary: dict[str, int], processor: dict[str, object] | None) -> bytes:
    """Give a tokenizer of whole words."""
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": processor, "decoder": None, "model": model,
    }).encode()  # fmt: skip


LAUGHS = '<?xml version="1.0"?>\n<!DOCTYPE net [\n<!ENTITY a0 "ha">\n' + "".join(
    f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">\n' for n in range(1, 10)
) + ']>\n<net name="&a9;" version="11"><layers/></net>\n'  # fmt: skip
OUTSIDE = (
    '<?xml version="1.0"?>\n<!DOCTYPE net [<!ENTITY x SYSTEM "file:///etc/passwd">]>\n<net version="11">&x;</net>\n'
)

FILES: dict[str, Callable[[], bytes]] = {
    "archives/parent.tar.zst": lambda: tar(file(f"{TOP}/../../escaped")),
    "archives/absolute.tar.zst": lambda: tar(file("/tmp/edgeq-escaped")),
    "archives/symlink.tar.zst": lambda: tar(file(f"{TOP}/tokenizer.json", kind=tarfile.SYMTYPE, link="/etc/passwd")),
    "archives/hardlink.tar.zst": lambda: tar(file(f"{TOP}/tokenizer.json", kind=tarfile.LNKTYPE, link="/etc/passwd")),
    "archives/pipe.tar.zst": lambda: tar(file(f"{TOP}/pipe", kind=tarfile.FIFOTYPE)),
    "archives/device.tar.zst": lambda: tar(file(f"{TOP}/null", kind=tarfile.CHRTYPE)),
    "archives/twice.tar.zst": lambda: tar(file(f"{TOP}/manifest.json", b"other")),
    "archives/letters.tar.zst": lambda: tar(file(f"{TOP}/MANIFEST.json", b"other")),
    "archives/file-and-folder.tar.zst": lambda: tar(file(f"{TOP}/manifest.json/inner")),
    "archives/two-tops.tar.zst": lambda: tar(file("elsewhere/file")),
    "archives/backslash.tar.zst": lambda: tar(file(f"{TOP}\\..\\..\\escaped")),
    "archives/control.tar.zst": lambda: tar(file(f"{TOP}/\x1b[2Jname")),
    "archives/extension.tar.zst": lambda: tar(file(f"{TOP}/{'x' * 200}"), form=tarfile.PAX_FORMAT),
    "archives/extension-endless.tar.zst": lambda: compressed(raw_header("pax", b"x", b"77777777777\0") + bytes(1 << 16)),
    "archives/size-negative.tar.zst": lambda: compressed(raw_header(f"{TOP}/f", b"0", b"\xff" * 12) + bytes(1 << 12)),
    "archives/size-huge.tar.zst": lambda: compressed(raw_header(f"{TOP}/f", b"0", b"\x80" + b"\x7f" * 11) + bytes(1 << 12)),
    "archives/sparse.tar.zst": lambda: compressed(raw_header(f"{TOP}/f", b"S", b"00000000010\0") + bytes(1 << 12)),
    "archives/bomb.tar.zst": lambda: tar(file(f"{TOP}/zeros", bytes(300 << 20))),
    "archives/behind.tar.zst": lambda: compressed(zstandard.ZstdDecompressor().decompress(tar(), 1 << 20) + b"more"),
    "archives/window.tar.zst": lambda: b"\x28\xb5\x2f\xfd\x00\xf8" + bytes(64),
    "archives/empty.tar.zst": lambda: compressed(bytes(10240)),
    "archives/parent.zip": lambda: zipped(lambda archive: archive.writestr(entry(f"{TOP}/../../escaped"), b"x")),
    "archives/absolute.zip": lambda: zipped(lambda archive: archive.writestr(entry("/tmp/edgeq-escaped"), b"x")),
    "archives/drive.zip": lambda: zipped(lambda archive: archive.writestr(entry("C:escaped"), b"x")),
    "archives/symlink.zip": lambda: zipped(lambda a: a.writestr(entry(f"{TOP}/tokenizer.json", 0o120777), b"/etc/passwd")),
    "archives/folder.zip": lambda: zipped(lambda archive: archive.writestr(entry(f"{TOP}/folder/", 0o40755), b"")),
    "archives/letters.zip": lambda: zipped(lambda archive: archive.writestr(entry(f"{TOP}/MANIFEST.json"), b"other")),
    "archives/comment.zip": lambda: zipped(lambda archive: setattr(archive, "comment", b"PK\x05\x06" + bytes(18))),
    "archives/encrypted.zip": lambda: changed(
        zipped(lambda a: a.writestr(entry(f"{TOP}/secret"), b"x")), b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"
    ),
    "archives/bomb.zip": bomb_zip,
    "archives/lying.zip": lying_zip,
    "archives/count.zip": lambda: changed(zipped(lambda archive: None), b"PK\x05\x06\0\0\0\0\x02\0\x02\0", b"PK\x05\x06\0\0\0\0\xff\xff\xff\xff"),
    "archives/text.zip": lambda: b"this is no archive\n",
    "golden/pickle.npz": lambda: npz("input_ids", object_npy()),
    "golden/huge.npz": lambda: npz("reference", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }")),
    "golden/negative.npz": lambda: npz("reference", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }")),
    "golden/overflow.npz": lambda: npz("reference", npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**62}, {2**62}), }}")),
    "golden/nested.npz": lambda: npz("reference", npy("(" * 900)),
    "golden/long-header.npz": lambda: npz("reference", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4), }" + " " * 60_000)),
    "golden/fields.npz": lambda: npz("reference", npy("{'descr': [('a', '<f4'), ('b', '|O')], 'fortran_order': False, 'shape': (2,), }", bytes(64))),
    "golden/not-finite.npz": lambda: npz("reference", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4), }", b"\xff" * 32)),
    "golden/compressed.npz": lambda: npz("reference", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4), }", bytes(32)), zipfile.ZIP_DEFLATED),
    "golden/nested.jsonl": lambda: b'{"text": ' + b"[" * 20_000 + b"\n",
    "golden/surrogate.jsonl": lambda: b'{"text": "\\ud800"}\n{"text": "b"}\n',
    "golden/digits.jsonl": lambda: b'{"text": ' + b"9" * 5_000 + b"}\n",
    "golden/not-a-number.jsonl": lambda: b'{"text": "a", "weight": NaN}\n{"text": "b"}\n',
    "golden/number.jsonl": lambda: b'{"text": 1}\n{"text": "b"}\n',
    "records/nested.json": lambda: b'{"a":' * 5_000,
    "records/not-a-number.json": lambda: b'{"target": "tiny-target", "ran_on": "device", "measures": {"spearman": NaN}}',
    "records/twice.json": lambda: b'{"format": 1, "format": 2}',
    "records/bytes.json": lambda: b"\x00\xff\xfe" * 100,
    "models/parent.onnx": lambda: onnx_file("../../../../etc/passwd"),
    "models/absolute.onnx": lambda: onnx_file("/etc/passwd"),
    "models/branch.onnx": lambda: onnx_file("../../../../etc/passwd", where="branch"),
    "models/context.onnx": lambda: onnx_file("../../../../etc/passwd", where="context"),
    "models/text.onnx": lambda: b"this is no model\n",
    "models/laughs.xml": lambda: LAUGHS.encode(),
    "models/outside.xml": lambda: OUTSIDE.encode(),
    "models/numbers.xml": lambda: b'<net version="' + b"9" * 5_000 + b'"><layers><layer id="0"/></layers></net>',
    "tokenizers/panic.json": lambda: tokenizer(
        {"[PAD]": 0, "a": 1},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
         "special_tokens": {"[SEP]": {"id": "[CLS]", "ids": [0], "tokens": ["[CLS]"]}}},
    ),
    "tokenizers/no-vocabulary.json": lambda: tokenizer({}, None),
    "tokenizers/nested.json": lambda: b'{"model":' * 5_000,
    "targets/nested.toml": lambda: b"name = " + b"[" * 20_000,
    "targets/not-a-number.toml": lambda: b'name = "not-a-number"\n[gate]\nregret_mean_max = nan\nspearman_min = inf\n',
    "targets/bytes.toml": lambda: b"\xff\xfe\x00",
    "targets/digits.toml": lambda: b"a = " + b"9" * 5_000,
}  # fmt: skip


def main(folder: Path) -> None:
    """Write every file."""
    for name, make in FILES.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(make())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
