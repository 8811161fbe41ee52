from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from edgeq.errors import ConfigError
from edgeq.evaluation.datasets import StsPairs, load_beir, load_sts
from edgeq.evaluation.tasks import evaluate_retrieval, evaluate_sts, retrieval, sts_spearman

PAIRS = [("a cat", 'the "cat', 4.5), ("a dog", "a car, red", 0.5), ("rain", "snow", 2.0)]


def write_sts(path: Path) -> None:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"sentence1": a, "sentence2": b, "score": s, "genre": "x"}) for a, b, s in PAIRS]
    elif path.suffix == ".tsv":
        lines = ["genre\tscore\tsentence1\tsentence2", *(f"x\t{s}\t{a}\t{b}" for a, b, s in PAIRS)]
    else:
        quoted = [(a, '"' + b.replace('"', '""') + '"', s) for a, b, s in PAIRS]
        lines = ["sentence1,sentence2,score", *(f"{a},{b},{s}" for a, b, s in quoted)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("suffix", ["jsonl", "tsv", "csv"])
def test_sts_files_of_each_kind_read_alike(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"sts.{suffix}"
    write_sts(path)
    pairs = load_sts(path)
    assert list(zip(pairs.first, pairs.second, pairs.scores.tolist(), strict=True)) == PAIRS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "no such file"),
        ("sts.txt", "x", "'.txt'"),
        ("sts.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": ', ":2: not JSON"),
        ("sts.jsonl", "[1]\n", ":1: a JSON list"),
        ("sts.jsonl", '\n{"sentence1": "a", "score": 1}\n', ":2: 'sentence2' holds no text; found columns"),
        ("sts.jsonl", '{"sentence1": "a", "sentence2": "b", "score": "high"}\n', ":1: 'score' holds no number"),
        ("sts.jsonl", '{"sentence1": "a", "sentence2": "b", "score": NaN}\n', "finite"),
        ("sts.tsv", "sentence1\tscore\na\t1\n", ":2: 'sentence2'"),
        ("sts.csv", "", "0 pairs"),
        ("sts.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 1}\n' * 5, "1 different scores"),
        ("sts.jsonl", b'{"sentence1": "a"}\n{"sentence1": "\xff"}', ":2: not UTF-8 (byte 0xff)"),
        ("sts.jsonl.gz", b"not packed", "cannot be read"),
        ("sts.jsonl.gz", gzip.compress(b"x" * 1000, mtime=0)[:-9], "cannot be read"),
    ],
)
def test_a_bad_sts_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: str | bytes | None, said: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        load_sts(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


QRELS = "q1\td2\t1\nq2\td1\t2\nq2\td3\t1\nq3\td1\t0\n"


def write_beir(directory: Path, qrels: str = QRELS, packed: bool = False) -> None:
    documents = [
        {"_id": "d1", "title": "T", "text": "one"},
        {"_id": "d2", "title": "", "text": "two"},
        {"_id": "d3", "text": "three"},
    ]
    corpus = "".join(json.dumps(row) + "\n" for row in documents).encode()
    if packed:
        (directory / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus))
    else:
        (directory / "corpus.jsonl").write_bytes(corpus)
    queries = [{"_id": f"q{number}", "text": f"query {number}"} for number in (1, 2, 3, 4)]
    (directory / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries), encoding="utf-8")
    (directory / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels, encoding="utf-8")


@pytest.mark.parametrize("packed", [False, True])
def test_a_beir_folder_is_read(tmp_path: Path, packed: bool) -> None:
    write_beir(tmp_path, packed=packed)
    data = load_beir(tmp_path)
    assert data.documents == ("T one", "two", "three")
    assert data.queries == ("query 1", "query 2")  # query 3 has nothing relevant, query 4 no judgement
    assert [dict(judged) for judged in data.qrels] == [{1: 1}, {0: 2, 2: 1}]


def test_qrels_may_lie_in_their_own_folder(tmp_path: Path) -> None:
    write_beir(tmp_path)
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels.tsv").rename(tmp_path / "qrels" / "test.tsv")
    assert len(load_beir(tmp_path).queries) == 2


@pytest.mark.parametrize(
    ("qrels", "said"),
    [
        ("q1\td9\t1\n", "qrels.tsv:2: id 'd9' is not in corpus.jsonl"),
        ("q9\td1\t1\n", "qrels.tsv:2: id 'q9' is not in queries.jsonl"),
        ("q1\td1\n", "qrels.tsv:2: 'score' holds no number"),
        ("q1\td1\t0\n", "no query has a document with a score above 0"),
        ("", "no query"),
    ],
)
def test_bad_qrels_are_named(tmp_path: Path, qrels: str, said: str) -> None:
    write_beir(tmp_path, qrels)
    with pytest.raises(ConfigError) as caught:
        load_beir(tmp_path)
    assert said in str(caught.value)


def test_a_missing_beir_file_and_a_double_id_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="corpus.jsonl or corpus.jsonl.gz is not there"):
        load_beir(tmp_path)
    write_beir(tmp_path)
    with (tmp_path / "queries.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"_id": "q1", "text": "again"}\n')
    with pytest.raises(ConfigError, match=r"queries.jsonl:5: _id 'q1' stands there twice"):
        load_beir(tmp_path)


def test_spearman_follows_the_order_of_the_cosines() -> None:
    first = np.tile(np.array([[1, 0]], np.float32), (4, 1))
    angles = np.array([0.1, 0.4, 0.9, 1.5])
    second = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32) * 3
    assert sts_spearman(first, second, np.array([5.0, 3.0, 2.0, 1.0])) == pytest.approx(1.0)
    assert sts_spearman(first, second, np.array([1.0, 2.0, 3.0, 5.0])) == pytest.approx(-1.0)
    second[1] = np.nan
    with pytest.raises(ConfigError, match="NaN"):
        sts_spearman(first, second, np.arange(4.0))


def test_retrieval_figures_of_a_known_ranking() -> None:
    documents = np.stack([[np.cos(angle), np.sin(angle)] for angle in np.linspace(0, 1.2, 12)]).astype(np.float32)
    queries = documents[:1]
    # Nearest first is 0, 1, 2...; relevant are positions 1 (grade 2), 3 and 11 (out of the first ten).
    found = retrieval(queries, documents, [{1: 2, 3: 1, 11: 1}])
    gained = 2 / math.log2(3) + 1 / math.log2(5)
    best = 2 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    assert found.ranking.tolist() == [list(range(10))]
    assert found.ndcg_at_10 == pytest.approx(gained / best)
    assert found.recall_at_10 == pytest.approx(2 / 3)


def test_a_corpus_of_fewer_than_ten_documents_is_ranked() -> None:
    found = retrieval(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), [{0: 1}, {1: 1}, {2: 1}])
    assert (found.ndcg_at_10, found.recall_at_10) == (1.0, 1.0)


def embed_words(texts, prompt_name=None):  # type: ignore[no-untyped-def]
    rows = [np.random.default_rng(list(text.encode())).standard_normal(16) for text in texts]
    return np.array(rows, np.float32)


def test_an_artifact_equal_to_fp32_keeps_everything(tmp_path: Path) -> None:
    write_beir(tmp_path)
    result = evaluate_retrieval(load_beir(tmp_path), embed_words, embed_words)
    assert result.ndcg_at_10.retention_percent == 100.0
    assert result.top10_overlap == 1.0
    assert (result.documents, result.queries) == (3, 2)


def test_a_worse_artifact_keeps_less(tmp_path: Path) -> None:
    pairs = StsPairs(tuple("abcdefgh"), tuple("hgfedcba"), np.arange(8.0))
    scored = {text: np.array([np.cos(n), np.sin(n)], np.float32) for n, text in enumerate("abcdefgh")}

    def reference(texts, prompt_name):  # type: ignore[no-untyped-def]
        return np.stack([scored[text] for text in texts])

    cosines = np.sum(reference(pairs.first, None) * reference(pairs.second, None), axis=1)
    pairs = StsPairs(pairs.first, pairs.second, cosines + np.arange(8) * 1e-3)
    result = evaluate_sts(pairs, reference, lambda texts, _: embed_words(texts))
    assert result.spearman.float32 > 0.9
    assert result.spearman.retention_percent == pytest.approx(100 * result.spearman.artifact / result.spearman.float32)
    assert result.spearman.retention_percent < 90


def test_an_fp32_without_any_correlation_is_refused() -> None:
    pairs = StsPairs(("a", "b", "c"), ("a", "b", "c"), np.arange(3.0))
    with pytest.raises(ConfigError, match="Spearman of FP32 is"):
        evaluate_sts(pairs, lambda texts, _: np.ones((3, 4), np.float32), lambda texts, _: embed_words(texts))


def test_queries_and_documents_are_embedded_by_their_own_methods(tmp_path: Path) -> None:
    write_beir(tmp_path)
    asked: list[tuple[int, str]] = []

    def embed(texts, method):  # type: ignore[no-untyped-def]
        asked.append((len(texts), method))
        return embed_words(texts)

    evaluate_retrieval(load_beir(tmp_path), embed, embed)
    assert asked == [(2, "encode_query"), (3, "encode_document")] * 2
