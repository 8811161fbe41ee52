from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_bundle import DIM, WORDS, TinyBackend, make_bundle

from edgeq import cli
from edgeq.backends.registry import BACKENDS
from edgeq.bundle import fingerprint
from edgeq.bundle.load import load
from edgeq.bundle.manifest import load_manifest
from edgeq.codecs.fit import fit_codec
from edgeq.codecs.statistics import observe_vectors, statistics_bytes
from edgeq.errors import BundleCorrupt, ConfigError, EdgeqError
from edgeq.system.progress import silent
from edgeq.vectors import build as building
from edgeq.vectors.build import IndexRequest, build
from edgeq.vectors.index import Index, open_index
from edgeq.vectors.scan import FaissScan, NumpyScan, exact
from edgeq.vectors.texts import TextStream

COUNT = 300
Vectors = NDArray[np.float32]


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(count)]


TEXTS = sentences(COUNT)
QUERIES = sentences(20, 1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "tiny", TinyBackend())  # type: ignore[arg-type]
    monkeypatch.setattr(building, "_STEP", 64)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    found = np.random.default_rng(0).standard_normal((64, DIM)).astype(np.float32) * 0.25
    return make_bundle(tmp_path / "out", codecs=statistics_bytes(observe_vectors(found, "test")))[0]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS))
    return path


def request(bundle: Path, texts: Path, folder: Path, codec: str = "int8", **more: object) -> IndexRequest:
    fields = {"rescoring": None, "kind": "exact", "embed": load(bundle).encode_document} | more
    return IndexRequest(
        bundle=bundle, manifest=load_manifest(bundle), texts=TextStream.of_file(texts, None), codec=codec,
        folder=folder, **fields,
    )  # type: ignore[arg-type]  # fmt: skip


def nearest(bundle: Path, count: int = 10) -> NDArray[np.int64]:
    loaded = load(bundle)
    return np.argsort(-(loaded.encode(QUERIES) @ loaded.encode(TEXTS).T), axis=1, kind="stable")[:, :count]


def similarity(bundle: Path, rows: NDArray[np.int64]) -> float:
    """Mean similarity of the texts that were found: many texts of few words are equally near."""
    loaded = load(bundle)
    return float(np.take_along_axis(loaded.encode(QUERIES) @ loaded.encode(TEXTS).T, rows, axis=1).mean())


def found(folder: Path, bundle: Path) -> NDArray[np.int64]:
    return open_index(folder).search_vectors(load(bundle).encode(QUERIES))


@pytest.mark.parametrize("codec", ["float32", "int8", "int4", "rabitq2", "binary", "ternary"])
def test_an_index_finds_what_floats_find(codec: str, bundle: Path, texts: Path, tmp_path: Path) -> None:
    record = build(request(bundle, texts, tmp_path / "index", codec), silent)
    assert (record.codec, record.texts.count, record.kind) == (codec, COUNT, "exact")
    assert record.rescoring == (None if codec in ("float32", "int8") else "int8-centred")
    best = similarity(bundle, nearest(bundle))
    assert similarity(bundle, found(tmp_path / "index", bundle)) > best - 0.002


def test_without_rescoring_bits_find_less(bundle: Path, texts: Path, tmp_path: Path) -> None:
    build(request(bundle, texts, tmp_path / "bits", "binary", rescoring=""), silent)
    build(request(bundle, texts, tmp_path / "both", "binary"), silent)
    bits, both = (similarity(bundle, found(tmp_path / name, bundle)) for name in ("bits", "both"))
    assert bits < both - 0.01


def test_a_record_names_bundle_texts_and_codec(bundle: Path, texts: Path, tmp_path: Path) -> None:
    record = build(request(bundle, texts, tmp_path / "index", "binary"), silent)
    assert record.texts.sha256 == TextStream.of_file(texts, None).sha256()
    assert record.space == fingerprint.space(load_manifest(bundle))
    assert {ref.path for ref in record.files} == {
        "codec.npz", "codes.bin", "rescoring.npz", "rescoring.bin", "probes.jsonl", "probes.npy",
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == sorted(
        [*(ref.path for ref in record.files), "index.json"]
    )


def test_the_same_again_is_kept_and_another_is_refused(bundle: Path, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    asked = request(bundle, texts, folder)
    record = build(asked, silent)

    def never(some: Sequence[str]) -> Vectors:
        raise AssertionError("nothing is embedded again")

    assert build(replace(asked, embed=never), silent) == record
    with pytest.raises(ConfigError, match="holds an index of other inputs"):
        build(replace(asked, codec="binary"), silent)
    assert build(replace(asked, codec="binary", overwrite=True), silent).codec == "binary"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is no index, so it is left alone"):
        build(replace(asked, folder=tmp_path / "own", overwrite=True), silent)


@pytest.mark.parametrize("codec", ["binary", "first8+int8"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_build_goes_on(codec: str, bundle: Path, texts: Path, tmp_path: Path) -> None:
    """Kill a build with SIGKILL after each number of steps in turn, until one is through."""
    folder, whole = tmp_path / "index", tmp_path / "whole"
    embed = load(bundle).encode_document
    asked = request(bundle, texts, folder, codec, embed=embed)
    deaths = 0
    while True:
        child = os.fork()
        if child == 0:
            left = 2

            def mortal(some: Sequence[str]) -> Vectors:
                nonlocal left
                if left == 0:
                    with (folder / "codes.bin").open("ab") as file:
                        # Half a row; of two files the first may be whole steps ahead.
                        file.write(b"x" if codec != "binary" else b"x" * (64 * DIM // 8 + 1))
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return embed(some)

            try:
                build(replace(asked, embed=mortal), silent)
            finally:
                os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        deaths += 1
        assert deaths < 10
        with pytest.raises(ConfigError, match="Its build was stopped"):
            open_index(folder)
    assert deaths >= 2
    build(replace(asked, folder=whole), silent)
    for name in ("codes.bin", "codec.npz", "probes.npy", "index.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_stopped_build_of_other_inputs_is_not_mixed_in(bundle: Path, texts: Path, tmp_path: Path) -> None:
    def dies(some: Sequence[str]) -> Vectors:
        raise KeyboardInterrupt

    asked = request(bundle, texts, tmp_path / "index")
    with pytest.raises(KeyboardInterrupt):
        build(replace(asked, embed=dies), silent)
    with pytest.raises(ConfigError, match="holds a build of other inputs that was stopped"):
        build(replace(asked, codec="binary"), silent)
    build(replace(asked, codec="binary", overwrite=True), silent)


def spoil_codes(index: Path) -> None:
    (index / "codes.bin").write_bytes((index / "codes.bin").read_bytes()[:-5])


def spoil_record(index: Path) -> None:
    (index / "index.json").write_text((index / "index.json").read_text().replace('"format": 1', '"format": 2'))


def spoil_codec(index: Path) -> None:
    sample = np.random.default_rng(3).standard_normal((64, DIM)).astype(np.float32)
    content = fit_codec("int8", sample, "other").to_bytes()
    (index / "codec.npz").write_bytes(content.ljust((index / "codec.npz").stat().st_size, b"\0"))
    record = json.loads((index / "index.json").read_bytes())
    for ref in record["files"]:
        if ref["path"] == "codec.npz":
            ref["size_bytes"] = (index / "codec.npz").stat().st_size
    (index / "index.json").write_text(json.dumps(record))


def lose_codes(index: Path) -> None:
    (index / "codes.bin").unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_codes, "truncated or damaged"),
        (spoil_record, "format"),
        (spoil_codec, "is another codec than the one that made the codes"),
        (lose_codes, "is not there"),
    ],
)
def test_a_spoilt_index_is_refused(
    spoil: Callable[[Path], None], reason: str, bundle: Path, texts: Path, tmp_path: Path
) -> None:
    build(request(bundle, texts, tmp_path / "index"), silent)
    spoil(tmp_path / "index")
    with pytest.raises(BundleCorrupt, match=reason):
        open_index(tmp_path / "index")


def test_fewer_texts_than_results(bundle: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("how do i\nmy password\nthanks a lot\n")
    build(request(bundle, few, tmp_path / "index"), silent)
    with pytest.raises(ConfigError, match="10 results are asked for, and the index has 3 texts"):
        found(tmp_path / "index", bundle)
    assert open_index(tmp_path / "index").search_vectors(load(bundle).encode(QUERIES), 3).shape == (20, 3)


def test_vectors_that_are_not_finite_end_a_build(bundle: Path, texts: Path, tmp_path: Path) -> None:
    def broken(some: Sequence[str]) -> Vectors:
        return np.full((len(some), DIM), np.nan, np.float32)

    with pytest.raises(ConfigError, match="holds NaN or infinity"):
        build(request(bundle, texts, tmp_path / "index", embed=broken), silent)
    opened = build_and_open(bundle, texts, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"shape \[1, 3\]"):
        opened.search_vectors(np.zeros((1, 3), np.float32))


def build_and_open(bundle: Path, texts: Path, folder: Path, codec: str = "int8") -> Index:
    build(request(bundle, texts, folder, codec), silent)
    return open_index(folder)


def test_another_model_is_refused_and_another_form_measured(bundle: Path, texts: Path, tmp_path: Path) -> None:
    opened = build_and_open(bundle, texts, tmp_path / "index")
    same = load(bundle)
    assert opened.require_space(same, "same") is None
    manifest = same.manifest
    other = load(bundle)
    other.manifest = manifest.model_copy(
        update={"source": manifest.source.model_copy(update={"prompts": {"query": "q: "}})}
    )
    with pytest.raises(ConfigError, match="are of another space"):
        opened.require_space(other, "other")
    other.manifest = manifest.model_copy(
        update={"target": manifest.target.model_copy(update={"runtime": {"threads": 9}})}
    )
    loss = opened.require_space(other, "form")
    assert loss is not None and loss.texts == 64
    assert loss.cosine_min == pytest.approx(1.0, abs=1e-6) and loss.neighbours_shared == 1.0
    with pytest.raises(ConfigError, match="--exact takes that form alone"):
        opened.require_space(other, "form", is_exact=True)
    moved = opened.form_loss(lambda some: same.encode(some)[:, ::-1])
    assert moved.cosine_mean < 0.5 and moved.neighbours_shared < 0.5


def test_texts_come_one_by_one_from_every_format(tmp_path: Path) -> None:
    rows = [("a", "first text"), ("b", 'with "quotes", a comma'), ("c", "")]
    (tmp_path / "t.txt").write_text("".join(f"{text}\n" for _, text in rows))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"_id": i, "text": text}) + "\n" for i, text in rows))
    (tmp_path / "t.csv").write_text('text\nfirst text\n"with ""quotes"", a comma"\n""\n')
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress((tmp_path / "t.jsonl").read_bytes()))
    for name in ("t.txt", "t.jsonl", "t.csv", "t.jsonl.gz"):
        assert [text for text, _ in TextStream.of_file(tmp_path / name, None)] == [text for _, text in rows], name
    assert [i for _, i in TextStream.of_file(tmp_path / "t.jsonl.gz", None)] == ["a", "b", "c"]
    shutil.copy(tmp_path / "t.jsonl", tmp_path / "corpus.jsonl")
    assert len(list(TextStream.of_beir(tmp_path))) == 3
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "t.jsonl.gz").read_bytes()[:-10])
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    for name, reason in (("cut.jsonl.gz", "truncated"), ("latin.txt", "UTF-8"), ("list.jsonl", "object is needed")):
        with pytest.raises(ConfigError, match=reason):
            list(TextStream.of_file(tmp_path / name, None))
    with pytest.raises(ConfigError, match="no such file"):
        TextStream.of_file(tmp_path / "none.txt", None)


@pytest.mark.vectors
@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "int8-centred", "binary", "pq8"])
def test_faiss_scans_as_numpy_does(codec: str) -> None:
    pytest.importorskip("faiss", reason="needs the extra `vectors`")
    rng = np.random.default_rng(0)
    rows, queries = (rng.standard_normal((count, 50)).astype(np.float32) for count in (12_000, 30))
    fitted = fit_codec(codec, rows, "test")
    codes = fitted.encode_bytes(rows)
    one, other = exact(fitted, codes), NumpyScan(fitted, codes)
    assert isinstance(one, FaissScan)
    found, wanted = one.nearest(queries, 20), other.nearest(queries, 20)
    shared = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found.tolist(), wanted.tolist(), strict=True)])
    assert shared > (0.93 if codec == "binary" else 0.995)  # FAISS rounds the sums of bits, and bits tie


@pytest.mark.vectors
@pytest.mark.parametrize(
    ("kind", "codec"), [("hnsw", "int8-centred"), ("hnsw", "binary"), ("hnsw", "float16"), ("ivf", "int4")]
)
def test_approximate_indexes_find_nearly_the_same(
    kind: str, codec: str, bundle: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss", reason="needs the extra `vectors`")
    monkeypatch.setattr(building.approximate, "_CHECKPOINT_ROWS", 100)
    monkeypatch.setattr(building.approximate, "_ADDED_AT_ONCE", 90)
    build(request(bundle, texts, tmp_path / kind, codec, kind=kind), silent)
    assert similarity(bundle, found(tmp_path / kind, bundle)) > similarity(bundle, nearest(bundle)) - 0.02
    (path,) = [tmp_path / kind / name for name in ("hnsw.faiss", "ivf.npz") if (tmp_path / kind / name).is_file()]
    content = path.read_bytes()
    path.write_bytes(content[:-40] + b"\0" * 40 if kind == "ivf" else content[:40] + b"\0" * (len(content) - 40))
    with pytest.raises(EdgeqError, match="Build the index again|Make it again"):
        found(tmp_path / kind, bundle)


@pytest.mark.vectors
def test_a_graph_goes_on_from_its_last_checkpoint(
    bundle: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss", reason="needs the extra `vectors`")
    monkeypatch.setattr(building.approximate, "_CHECKPOINT_ROWS", 100)
    monkeypatch.setattr(building.approximate, "_ADDED_AT_ONCE", 50)
    seen: list[int] = []

    def watched(stage: str, done: int, total: int) -> None:
        if stage == "graph":
            seen.append(done)
            if done == 250 and seen.count(250) == 1:
                raise KeyboardInterrupt

    asked = request(bundle, texts, tmp_path / "index", kind="hnsw")
    with pytest.raises(KeyboardInterrupt):
        build(asked, watched)
    build(asked, watched)
    assert seen == [50, 100, 150, 200, 250, 250, 300]


@pytest.mark.vectors
def test_a_graph_holds_no_rotated_codes(bundle: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="index hnsw: holds codes of float32, float16, int8, binary, not of rabitq"):
        build(request(bundle, texts, tmp_path / "index", "rabitq", kind="hnsw"), silent)


def test_the_command_line_indexes_and_searches(
    bundle: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "index"
    assert cli.run(["index", str(bundle), "--texts", str(texts), "--codec", "binary", "--to", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    ask = ["search", str(folder), "--query", TEXTS[7], "--results", "3", "--texts", str(texts), "--json"]
    assert cli.run(ask) == 0
    hits = json.loads(capsys.readouterr().out)["queries"][0]["hits"]
    assert len(hits) == 3 and sorted(hits[0]["text"].split()) == sorted(TEXTS[7].split())
    other = tmp_path / "other.txt"
    other.write_text("how\n")
    assert cli.run([*ask[:-3], "--texts", str(other)]) == 2
    assert "is not the file" in capsys.readouterr().err
    assert cli.run(["search", str(folder)]) == 2
    assert cli.run(["index", str(bundle), "--to", str(folder)]) == 2
    assert cli.run(["index", str(bundle), "--texts", str(texts), "--codec", "int9", "--to", str(folder)]) == 2
    assert cli.run(["index", str(bundle), "--texts", str(texts), "--codec", "pq8", "--to", str(tmp_path / "pq")]) == 2
    assert f"is trained on at least 10000 texts, and {texts} has {COUNT}" in " ".join(
        capsys.readouterr().err.splitlines()[-1:]
    )


def test_embed_writes_codes(bundle: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "codes.npy"
    assert cli.run(["embed", str(bundle), "--texts", str(texts), "--codec", "binary", "--out", str(out)]) == 0
    assert np.load(out).shape == (COUNT, DIM // 8)
    assert cli.run(["embed", str(bundle), "--texts", str(texts), "--codec", "pq8", "--out", str(out)]) == 2


def test_no_text_is_no_index(bundle: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ConfigError, match="0 texts; at least 1 are needed"):
        build(request(bundle, empty, tmp_path / "index"), silent)
    bare = make_bundle(tmp_path / "bare")[0]  # of an edgeq that fitted nothing
    few = tmp_path / "few.txt"
    few.write_text("how do i\n" * 9)
    with pytest.raises(ConfigError, match="9 texts; at least 16 are needed"):
        build(request(bare, few, tmp_path / "other"), silent)
