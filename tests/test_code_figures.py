from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_bundle import DIM, TEXTS, WORDS, TinyBackend, make_bundle

from edgeq import cli
from edgeq.backends.registry import BACKENDS
from edgeq.codecs.codec import Codec
from edgeq.codecs.fit import codec_from_statistics
from edgeq.codecs.statistics import VectorStatistics, observe_vectors, statistics_bytes
from edgeq.codecs.stores import LAYOUTS, for_store
from edgeq.errors import ConfigError
from edgeq.system.progress import silent
from edgeq.vectors.measure import CodeFigures, Side, cross, measure, normalised, truth
from edgeq.vectors.recommend import budget, recommend

WIDTH = 64


def clustered(count: int, seed: int) -> NDArray[np.float32]:
    """Unit vectors in twenty clusters, so that neighbours are worth finding."""
    centres = np.random.default_rng(9).standard_normal((20, WIDTH))
    rng = np.random.default_rng(seed)
    return normalised((centres[rng.integers(20, size=count)] + 0.7 * rng.standard_normal((count, WIDTH))).astype("f4"))


DOCUMENTS, QUERIES = clustered(1500, 0), clustered(80, 1)
FLOATS = Side("FP32", DOCUMENTS, QUERIES)
NOISE = np.random.default_rng(5).standard_normal((1580, WIDTH)).astype(np.float32) * 0.01
INTEGER = Side("int8 model", normalised(DOCUMENTS + NOISE[:1500]), normalised(QUERIES + NOISE[1500:]))
STATISTICS = observe_vectors(clustered(256, 2), "test")
# Each query's relevant document is FP32's nearest.
QRELS = [{int(row): 1} for row in np.argmax(QUERIES @ DOCUMENTS.T, axis=1)]


def figures(*codecs: str, **more: object) -> list[CodeFigures]:
    ideal = truth(FLOATS, QRELS)
    return list(measure(ideal, [FLOATS, INTEGER], codecs, ["exact"], STATISTICS, **more))  # type: ignore[arg-type]


def test_floats_lose_nothing_and_each_loss_is_told_apart() -> None:
    whole, integer = figures("float32")
    assert (whole.recall_at_1, whole.recall_at_10, whole.recall_at_100, whole.regret_at_10) == (1, 1, 1, 0)
    assert whole.ndcg_at_10 == 1.0
    assert integer.lost_by_model > 0.01 and integer.recall_at_10 == pytest.approx(1 - integer.lost_by_model)
    assert integer.lost_by_code == pytest.approx(0, abs=1e-6) and integer.lost_by_index == 0
    coarse, coarse_integer = figures("binary", rescoring=None)
    assert coarse.lost_by_model == 0 and coarse.lost_by_code > 0.2 and coarse.regret_at_10 > 0.01
    assert coarse_integer.lost_by_model == integer.lost_by_model
    for each in (coarse, coarse_integer):
        parts = each.lost_by_model + each.lost_by_code + each.lost_by_index
        assert each.recall_at_10 == pytest.approx(1 - parts)


def test_finer_codes_order_the_candidates() -> None:
    plain, rescored, deep = (figures("binary", depths=[depth])[0] for depth in (1, 4, 30))
    assert plain.recall_at_10 < rescored.recall_at_10 <= deep.recall_at_10
    assert (rescored.code_bytes, rescored.rescoring_bytes, rescored.depth) == (WIDTH // 8, WIDTH, 4)
    assert deep.recall_at_10 > 0.97


def test_queries_of_one_form_in_documents_of_another_are_a_figure_of_their_own() -> None:
    ideal = truth(FLOATS, QRELS)
    (mixed,) = measure(ideal, [cross(INTEGER, FLOATS)], ["float32"], ["exact"], None)
    assert mixed.model == "queries int8 model, documents FP32"
    own = figures("float32")[1]
    assert own.recall_at_10 < mixed.recall_at_10 < 1  # one side rounded loses less than both


def test_swapped_rows_are_seen() -> None:
    ideal = truth(FLOATS, QRELS)
    swapped = Side("swapped", DOCUMENTS[::-1], QUERIES)
    (found,) = measure(ideal, [swapped], ["float32"], ["exact"], None)
    assert found.recall_at_10 < 0.05 and found.ndcg_at_10 is not None and found.ndcg_at_10 < 0.1
    assert found.lost_by_model > 0.95 and found.regret_at_10 > 0.5


def test_too_few_documents() -> None:
    with pytest.raises(ConfigError, match="9 documents; at least 10 are needed"):
        truth(Side("few", DOCUMENTS[:9], QUERIES))
    with pytest.raises(ConfigError, match="is trained on at least 10000 texts"):
        figures("pq8")


@pytest.mark.vectors
def test_an_index_has_a_loss_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="needs the extra `vectors`")
    from edgeq.vectors import approximate

    monkeypatch.setattr(approximate, "FEWEST_LISTS_READ", 1)
    monkeypatch.setattr(approximate, "LISTS_READ", 0.0)
    ideal = truth(FLOATS, QRELS)
    exact, hnsw, ivf = measure(ideal, [FLOATS], ["int8"], ["exact", "hnsw", "ivf"], STATISTICS)
    assert exact.lost_by_index == 0 and hnsw.lost_by_index < 0.02
    assert ivf.lost_by_index > 0 and ivf.lost_by_code == exact.lost_by_code
    (coarse,) = measure(ideal, [FLOATS], ["int4"], ["hnsw", "ivf"], STATISTICS)
    assert coarse.index == "ivf"  # HNSW does not hold int4


def test_the_room_is_stated_once() -> None:
    assert budget(64, None, None) == 64
    assert budget(None, 200e6, 1_000_000) == 200
    for wrong in ((None, None, None), (64, 2e8, 10), (None, 2e8, None), (0, None, None)):
        with pytest.raises(ConfigError, match="recommend:"):
            budget(*wrong)  # type: ignore[arg-type]


def advised(room: float, recall: float, expected: int | None = None, known: VectorStatistics | None = STATISTICS):  # type: ignore[no-untyped-def]
    return recommend(DOCUMENTS[:600], room, recall, known, ["exact"], expected, silent)


def test_the_smallest_that_holds_comes_first() -> None:
    advice = advised(40, 0.9)
    best = advice.best
    assert best is not None and best == advice.choices[0]
    assert best.memory_bytes_per_document <= 40 and best.figures.recall_at_10 >= 0.9
    held = [each.memory_bytes_per_document for each in advice.choices if each.holds]
    assert held == sorted(held)
    assert advised(64, 0.95).best.memory_bytes_per_document > held[0] - 1e-9
    assert "PCA, PQ and OPQ are left out" in advice.notes[1]
    assert "upper bound" in advised(40, 0.9, 1_000_000).notes[0] and "upper bound" not in advice.notes[0]


def test_where_nothing_holds_the_nearest_are_named() -> None:
    advice = advised(3, 0.999)
    assert advice.best is None and not any(each.holds for each in advice.choices)
    assert advice.choices[0].memory_bytes_per_document <= 12
    with pytest.raises(ConfigError, match="150 different texts"):
        recommend(DOCUMENTS[:150], 64, 0.9, None, ["exact"], None, silent)
    with pytest.raises(ConfigError, match="a ratio above 0"):
        advised(64, 95)


# The command line


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose FP32 model is its artifact."""
    monkeypatch.setitem(BACKENDS, "tiny", TinyBackend())  # type: ignore[arg-type]
    found = np.random.default_rng(0).standard_normal((64, DIM)).astype(np.float32) * 0.25
    path = make_bundle(tmp_path / "out", codecs=statistics_bytes(observe_vectors(found, "test")))[0]
    monkeypatch.setattr(
        sys.modules["edgeq.cli.evaluate"], "find_float_model", lambda manifest, against: path / "onnx" / "model.onnx"
    )
    return path


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    folder.mkdir()
    texts = [*TEXTS, *(" ".join([one, other]) for one in WORDS for other in WORDS if one < other)]
    rows = [{"_id": f"d{place}", "text": text} for place, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"_id": f"q{place}", "text": text} for place, text in enumerate(texts[32:60])]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    judged = "".join(f"q{place}\td{place + 32}\t1\n" for place in range(len(asked)))
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return folder


def test_evaluate_measures_codes(bundle: Path, beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = bundle.parent / "more.txt"
    more.write_text("thanks a lot again\nsend me the password\n")
    ask = ["evaluate", str(bundle), "--retrieval", str(beir), "--codec", "int8,binary"]
    assert cli.run([*ask, "--distractors", str(more), "--json"]) == 0, capsys.readouterr().err
    rows = json.loads(capsys.readouterr().out)["codes"]
    models = ["FP32", "tiny-target", "queries tiny-target, documents FP32", "queries FP32, documents tiny-target"]
    assert [row["model"] for row in rows] == [name for name in models for _ in range(2)]
    assert {row["documents"] for row in rows} == {len((beir / "corpus.jsonl").read_text().splitlines()) + 2}
    assert cli.run(ask) == 0
    assert "lost by model" in capsys.readouterr().out
    for wrong, reason in (
        (["--codec", "int9"], "is none of"),
        (["--codec", "int8", "--index", "annoy"], "is none of exact, hnsw, ivf"),
        (["--index", "hnsw"], "are for codes"),
        (["--codec", "int8", "--plot", "a.gif"], ".svg or .png is needed"),
    ):
        assert cli.run(["evaluate", str(bundle), "--retrieval", str(beir), *wrong]) == 2
        assert reason in " ".join(capsys.readouterr().err.split())


@pytest.mark.report
def test_a_plot_is_drawn(bundle: Path, beir: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    ask = ["evaluate", str(bundle), "--retrieval", str(beir), "--codec", "int8,rabitq2"]
    assert cli.run([*ask, "--plot", str(tmp_path / "plot.svg")]) == 0
    drawn = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert drawn.count("rabitq2") >= 2 or "<svg" in drawn


def test_recommend_prints_a_command(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    rng = np.random.default_rng(0)
    texts.write_text("".join(" ".join(rng.choice(WORDS, 6)) + "\n" for _ in range(300)))
    ask = ["recommend", str(bundle), "--texts", str(texts)]
    assert cli.run([*ask, "--memory", "20MB", "--documents", "1M", "--recall", "0.8"]) == 0
    shown = capsys.readouterr()
    assert f"edgeq index {bundle} --texts FILE --codec" in " ".join(shown.out.split())
    assert "upper bound" in " ".join(shown.err.split())
    assert cli.run([*ask, "--bytes", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_most"] == 64
    for wrong in (["--memory", "big", "--documents", "1M"], [], ["--bytes", "64", "--recall", "95"]):
        assert cli.run([*ask, *wrong]) == 2


# Vector stores


def live(name: str) -> Codec:
    return codec_from_statistics(name, STATISTICS)


def hamming() -> NDArray[np.int64]:
    """Distances of the bits, int64[queries, documents]."""
    codes, asked = live("binary").encode(DOCUMENTS), live("binary").encode(QUERIES)
    return np.unpackbits(asked[:, None] ^ codes[None], axis=2).sum(axis=2).astype(np.int64)


def test_every_store_has_a_layout_and_others_are_refused() -> None:
    for layout in LAYOUTS:
        codes = for_store(layout.store, live(layout.codec), DOCUMENTS[:4])
        assert len(codes) == 4
    with pytest.raises(ConfigError, match="store usearch: holds binary, int8, float16; codec rabitq"):
        for_store("usearch", live("rabitq"), DOCUMENTS)
    with pytest.raises(ConfigError, match="is none of sentence-transformers"):
        for_store("redis", live("int8"), DOCUMENTS)


@pytest.mark.export
def test_the_layout_of_sentence_transformers_is_its_own() -> None:
    module = pytest.importorskip("sentence_transformers.util", reason="needs the extra `export`")
    ubinary, binary = (layout.convert(live("binary").encode_bytes(DOCUMENTS)) for layout in LAYOUTS[:2])
    np.testing.assert_array_equal(ubinary, module.quantize_embeddings(DOCUMENTS, precision="ubinary"))
    np.testing.assert_array_equal(binary, module.quantize_embeddings(DOCUMENTS, precision="binary"))


@pytest.mark.vectors
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_usearch_finds_what_the_codes_say() -> None:
    pytest.importorskip("usearch", reason="needs usearch (extra `dev`)")
    from usearch.index import Index

    rows, asked = (for_store("usearch", live("binary"), each) for each in (DOCUMENTS, QUERIES))
    index = Index(ndim=WIDTH, metric="hamming", dtype="b1")
    index.add(np.arange(len(rows)), rows)
    found = index.search(asked, 10, exact=True)
    np.testing.assert_array_equal(np.asarray(found.distances, int), np.sort(hamming(), axis=1)[:, :10])
    rows, asked = (for_store("usearch", live("int8"), each) for each in (DOCUMENTS, QUERIES))
    index = Index(ndim=WIDTH, metric="ip", dtype="i8")
    index.add(np.arange(len(rows)), rows)
    found = index.search(asked, 10, exact=True)
    best = np.argsort(-(asked.astype(np.int64) @ rows.T.astype(np.int64)), axis=1)[:, :10]
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found.keys.tolist(), best.tolist(), strict=True)]) > 9.8


@pytest.mark.vectors
def test_sqlite_finds_what_the_codes_say() -> None:
    sqlite_vec = pytest.importorskip("sqlite_vec", reason="needs sqlite-vec (extra `dev`)")
    database = sqlite3.connect(":memory:")
    if not hasattr(database, "enable_load_extension"):
        pytest.skip("this Python's sqlite3 loads no extensions")
    database.enable_load_extension(True)
    sqlite_vec.load(database)
    database.execute(f"create virtual table t using vec0(bits bit[{WIDTH}], codes int8[{WIDTH}])")
    bits, codes = (for_store("sqlite-vec", live(name), DOCUMENTS) for name in ("binary", "int8"))
    rows = [(row, one.tobytes(), other.tobytes()) for row, (one, other) in enumerate(zip(bits, codes, strict=True))]
    database.executemany("insert into t(rowid, bits, codes) values (?, vec_bit(?), vec_int8(?))", rows)
    # Its own quantiser gives the same bits.
    floats = DOCUMENTS[0].astype("<f4").tobytes()
    assert database.execute("select vec_quantize_binary(vec_f32(?))", (floats,)).fetchone()[0] == bits[0].tobytes()
    asked = for_store("sqlite-vec", live("binary"), QUERIES)
    ask = "select rowid, distance from t where bits match vec_bit(?) and k = 10 order by distance"
    for query, distances in zip(asked[:10], hamming()[:10], strict=True):
        found = database.execute(ask, (query.tobytes(),)).fetchall()
        assert [int(distance) for _, distance in found] == np.sort(distances)[:10].tolist()


@pytest.mark.vectors
def test_faiss_takes_bits_and_int8() -> None:
    faiss = pytest.importorskip("faiss", reason="needs the extra `vectors`")
    index = faiss.IndexBinaryFlat(WIDTH)
    index.add(for_store("faiss", live("binary"), DOCUMENTS))
    distances, _ = index.search(for_store("faiss", live("binary"), QUERIES), 10)
    np.testing.assert_array_equal(distances, np.sort(hamming(), axis=1)[:, :10])
    numbers = faiss.IndexScalarQuantizer(WIDTH, faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT)
    codes, asked = (for_store("faiss", live("int8"), each).astype(np.float32) for each in (DOCUMENTS, QUERIES))
    numbers.add(codes)
    np.testing.assert_allclose(numbers.search(asked, 1)[0][:, 0], (asked @ codes.T).max(axis=1), rtol=1e-6)


def test_vectors_that_point_one_way_keep_their_order_in_centred_codes() -> None:
    """Where all vectors have one direction in common, as of E5, its size must not take the codes of what differs."""
    common = np.full(WIDTH, 0.4, np.float32)
    rows, asked = (normalised(each + common) for each in (DOCUMENTS, QUERIES))
    side = Side("one way", rows, asked)
    known = observe_vectors(rows[:256], "test")
    found = {
        each.codec: each.recall_at_10
        for each in measure(
            truth(side), [side], ["int8", "int8-centred", "binary", "binary-centred"], ["exact"], known, depths=[1]
        )
    }
    assert found["int8-centred"] > found["int8"] + 0.01
    assert found["binary-centred"] > found["binary"] + 0.05


def test_the_page_lists_every_layout() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs/reference/codecs.md").read_text(encoding="utf-8")
    for layout in LAYOUTS:
        row = f"| {layout.store} | `{layout.codec}` | {layout.column} | {layout.tried or 'not tried'} |"
        assert row in page
