"""The parity card: figures against vectors worked out here by hand, blank rows with reasons, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from tiny_bundle import DIM, GATE, MAX_SEQUENCE, WORDS, TinyBackend, make_report, make_target
from tiny_card import AlteringBackend, MissingBackend, write_bundle, write_float

from edgeq import cli
from edgeq.backends.registry import BACKENDS
from edgeq.bundle import turns
from edgeq.bundle.benchmark_child import Job
from edgeq.bundle.turns import Timed
from edgeq.data.tokens import Tokens, sha256_texts
from edgeq.errors import BundleCorrupt, ConfigError, EdgeqError, LoweringFailed, ToolMissing
from edgeq.evaluation.paired_times import Turns
from edgeq.records import RunsOn
from edgeq.reports import figures, timing
from edgeq.reports.bundles import collect
from edgeq.reports.card import Request, make_card
from edgeq.reports.contents import Card, Row

TEXTS = [" ".join(WORDS[i : i + 1 + i % 5]) for i in range(14)]


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(BACKENDS, "tiny", TinyBackend())  # type: ignore[arg-type]
    monkeypatch.setitem(BACKENDS, "missing", MissingBackend())  # type: ignore[arg-type]


@pytest.fixture
def float_file(tmp_path: Path) -> Path:
    return write_float(tmp_path / "cache")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def compared(*paths: Path, cache: Path, **options: object) -> Card:
    return make_card(Request(bundles=paths, cache=cache, **options), silent)  # type: ignore[arg-type]


def vectors(words: dict[str, NDArray[np.float32]]) -> list[NDArray[np.float64]]:
    """Average word vectors by hand."""
    sums = [np.sum([words[word].astype(np.float64) for word in text.split()], axis=0) for text in TEXTS]
    return [total / np.sqrt(np.dot(total, total)) for total in sums]


def word_vectors(file: Path) -> dict[str, NDArray[np.float32]]:
    import onnx

    table = next(item for item in onnx.load(file).graph.initializer if item.name == "table")
    unique = list(dict.fromkeys(["[PAD]", "[UNK]", *WORDS]))
    rows = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    return {word: numpy_helper.to_array(table)[rows[word]] for word in unique}


def cosine(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    return float(np.dot(first, second) / np.sqrt(np.dot(first, first) * np.dot(second, second)))


def row(found: Card, name: str) -> Row:
    return next(item for item in found.rows if item.name == name)


def test_figures_are_those_worked_out_by_hand(
    tmp_path: Path, float_file: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "half", TinyBackend(scale=0.5))  # type: ignore[arg-type]
    out = tmp_path / "out"
    write_bundle(out, "exact", "tiny", float_file)
    write_bundle(out, "half-first", "half", float_file)
    found = compared(out, cache=tmp_path / "cache", texts=texts)
    expected = vectors(word_vectors(float_file))
    changed = [vector * np.where(np.arange(DIM) == 0, 0.5, 1.0) for vector in expected]
    by_hand = centred_by_hand(expected, changed)
    assert [item.name for item in found.rows] == ["FP32 ONNX", "torch", "exact", "half-first"]
    measures = row(found, "half-first").measures
    assert measures is not None
    assert measures.centred_cosine_mean == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert measures.centred_cosine_min == pytest.approx(min(by_hand), abs=1e-6)
    assert row(found, "half-first").cosine_percentiles[0] == pytest.approx(min(by_hand), abs=1e-6)
    assert row(found, "half-first").cosine_percentiles[100] == pytest.approx(max(by_hand), abs=1e-6)
    assert len(row(found, "half-first").cosine_percentiles) == 101
    exact = row(found, "exact").measures
    assert exact is not None and exact.centred_cosine_min > 0.999999 and exact.top10_overlap == 1.0
    means = {(pair.first, pair.second): pair.cosine_mean for pair in found.pairs}
    assert means["exact", "half-first"] == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert means["FP32 ONNX", "exact"] == pytest.approx(1.0, abs=1e-6)
    order = np.argsort(by_hand)
    assert [item.text for item in found.worst_texts] == [TEXTS[place] for place in order[:10]]
    first = found.worst_texts[0]
    assert first.tokens == len(first.text.split())
    assert [error.name for error in first.errors] == ["exact", "half-first"]
    assert first.errors[1].cosine == pytest.approx(min(by_hand), abs=1e-6)
    assert first.errors[1].max_abs_error == pytest.approx(abs(expected[order[0]][0]) / 2, abs=1e-6)
    assert first.errors[0].max_abs_error < 1e-6


def centred_by_hand(expected: list[np.ndarray], found: list[np.ndarray]) -> list[float]:
    ours, theirs = ([row / np.linalg.norm(row) for row in rows] for rows in (expected, found))
    mean = np.mean(ours, axis=0)
    return [cosine(first - mean, second - mean) for first, second in zip(ours, theirs, strict=True)]


def _swapped(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors[::-1].copy()


def _one_wrong(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    vectors[0] = -vectors[0]
    return vectors


def _nan(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    vectors[0, 0] = np.nan
    return vectors


@pytest.mark.parametrize("alter", [_swapped, _one_wrong])
def test_swapped_and_wrong_vectors_show(
    alter: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    tmp_path: Path,
    float_file: Path,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BACKENDS, "wrong", AlteringBackend(alter))  # type: ignore[arg-type]
    out = tmp_path / "out"
    write_bundle(out, "right", "tiny", float_file)
    write_bundle(out, "wrong", "wrong", float_file)
    found = compared(out, cache=tmp_path / "cache", texts=texts)
    measures = row(found, "wrong").measures
    assert measures is not None and measures.centred_cosine_min < 0.9
    assert found.worst_texts[0].errors[1].cosine == pytest.approx(measures.centred_cosine_min)
    assert min(pair.cosine_min for pair in found.pairs if "wrong" in (pair.first, pair.second)) < 0.9
    assert min(pair.cosine_min for pair in found.pairs if "wrong" not in (pair.first, pair.second)) > 0.999999


def test_small_numbers_by_hand() -> None:
    reference = np.array([[1, 0], [0, 1], [3, 4], [1, 1]], np.float32)
    other = np.array([[1, 0], [0, 1], [4, 3], [1, -1]], np.float32)
    expected = centred_by_hand(list(reference.astype(float)), list(other.astype(float)))
    np.testing.assert_allclose(figures.cosines(reference, other), expected, atol=1e-6)
    (pair,) = figures.pairs([("a", reference), ("b", other)])
    assert (pair.first, pair.second) == ("a", "b")
    assert pair.cosine_mean == pytest.approx(np.mean(expected))
    assert pair.cosine_min == pytest.approx(min(expected))
    texts = ["one", "two", "three", "x" * 201]
    made = figures.measured("b", reference, other, texts, 1.0)
    worst = figures.worst_texts([made], reference, texts, Tokens(((1,), (1, 2), (1,), (1,)), 0, 0))
    assert [item.text for item in worst][:2] == ["x" * 200 + "…", "three"]
    assert [item.errors[0].max_abs_error for item in worst] == [2.0, 1.0, 0.0, 0.0]
    assert figures.percentiles(np.array([0.5, 0.9, 0.7]))[::50] == (0.5, 0.7, 0.9)


def test_json_comes_back_whole(tmp_path: Path, float_file: Path, texts: Path) -> None:
    write_bundle(tmp_path / "out", "exact", "tiny", float_file)
    found = compared(tmp_path / "out", cache=tmp_path / "cache", texts=texts)
    assert Card.model_validate_json(found.model_dump_json()) == found


def test_the_verb_prints_a_table_or_json(
    tmp_path: Path, float_file: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write_bundle(out, "exact", "tiny", float_file)
    write_bundle(out, "gone", "missing", float_file)
    assert cli.run(["compare", str(out), "--texts", str(texts), "--json", "--quiet"]) == 0
    found = Card.model_validate(json.loads(capsys.readouterr().out))
    assert [item.name for item in found.rows] == ["FP32 ONNX", "torch", "exact", "gone"]
    assert cli.run(["compare", str(out / "exact"), str(out / "gone"), "--texts", str(texts), "--quiet"]) == 0
    shown = capsys.readouterr().out
    for expected in ("FP32 ONNX", "exact", "gone", "not-run", 'pip install "some-runtime"', "cosine mean", "farthest"):
        assert expected in shown
    assert "Traceback" not in shown


def test_a_missing_runtime_leaves_its_row_blank(tmp_path: Path, float_file: Path, texts: Path) -> None:
    write_bundle(tmp_path / "out", "exact", "tiny", float_file)
    write_bundle(tmp_path / "out", "gone", "missing", float_file)
    found = compared(tmp_path / "out", cache=tmp_path / "cache", texts=texts)
    blank = row(found, "gone")
    assert blank.ran_on == "not-run"
    assert blank.reason is not None and 'pip install "some-runtime"' in blank.reason
    assert (blank.measures, blank.cosine_percentiles, blank.latency) == (None, (), ())
    assert blank.bundle is not None and blank.bundle.recorded is not None
    assert blank.size_bytes is not None and blank.size_bytes > 0
    assert all("gone" not in (pair.first, pair.second) for pair in found.pairs)
    assert [error.name for error in found.worst_texts[0].errors] == ["exact"]


def test_without_any_runtime_the_exit_code_says_what_is_missing(
    tmp_path: Path, float_file: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path / "out", "gone", "missing", float_file)
    assert cli.run(["compare", str(tmp_path / "out"), "--texts", str(texts)]) == ToolMissing.exit_code
    found = capsys.readouterr()
    assert "gone: some-runtime is not installed" in found.err.replace("\n", " ")
    assert found.out == ""


@pytest.mark.parametrize("kind", ["crash", "cpu", "unknown backend", "nan"])
def test_whatever_keeps_one_runtime_from_running_is_its_reason(
    kind: str, tmp_path: Path, float_file: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeq.system.host import machine

    def crash(found: NDArray[np.float32]) -> NDArray[np.float32]:
        raise LoweringFailed("the runtime died of SIGABRT")

    monkeypatch.setitem(BACKENDS, "broken", AlteringBackend(_nan if kind == "nan" else crash))  # type: ignore[arg-type]
    changes: dict[str, object] = {}
    if kind == "cpu":
        changes = {"runs_on": RunsOn(machine=machine(), cpu_flags_all=("no-such-flag",), cpu_flags_any=())}
    write_bundle(tmp_path / "out", "bad", "tiny" if kind == "cpu" else "broken", float_file, **changes)
    write_bundle(tmp_path / "out", "good", "tiny", float_file)
    if kind == "unknown backend":
        monkeypatch.delitem(BACKENDS, "broken")
    found = compared(tmp_path / "out", cache=tmp_path / "cache", texts=texts)
    said = {"crash": "SIGABRT", "cpu": "no-such-flag", "unknown backend": "known backends are", "nan": "gave NaN"}[kind]
    reason = row(found, "bad").reason
    assert reason is not None and said in reason
    assert row(found, "bad").measures is None
    assert row(found, "good").measures is not None


def test_bundles_of_two_models_are_refused_with_both_sums(tmp_path: Path, float_file: Path) -> None:
    other = write_float(tmp_path / "cache", seed=1)
    first = write_bundle(tmp_path / "out", "one", "tiny", float_file)
    second = write_bundle(tmp_path / "out", "two", "tiny", other, seed=1)
    with pytest.raises(ConfigError) as caught:
        collect([tmp_path / "out"])
    for sum_ in (first.float_model.file.sha256, second.float_model.file.sha256, first.source.sha256):
        assert sum_ in str(caught.value)


def test_what_holds_no_bundle_is_named(tmp_path: Path, float_file: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, said in ((tmp_path / "empty", "holds no bundle"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(ConfigError, match=said):
            collect([path])


@pytest.mark.parametrize("file", ["manifest.json", "onnx/model.onnx", "SHA256SUMS"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_damaged_bundle_is_not_passed_over(file: str, is_gone: bool, tmp_path: Path, float_file: Path) -> None:
    write_bundle(tmp_path / "out", "one", "tiny", float_file)
    write_bundle(tmp_path / "out", "two", "tiny", float_file)
    path = tmp_path / "out" / "two" / file
    if is_gone:
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises((BundleCorrupt, ConfigError), match="two"):
        collect([tmp_path / "out"])


def test_a_bundle_given_twice_counts_once_and_equal_targets_get_names_of_their_own(
    tmp_path: Path, float_file: Path
) -> None:
    write_bundle(tmp_path / "a", "one", "tiny", float_file)
    write_bundle(tmp_path / "b", "one", "tiny", float_file)
    assert [item.name for item in collect([tmp_path / "a", tmp_path / "a" / "one"])] == ["one"]
    assert [item.name for item in collect([tmp_path / "a", tmp_path / "b"])] == ["one (a/one)", "one (b/one)"]


def test_all_are_cut_where_the_shortest_is(tmp_path: Path, float_file: Path, texts: Path) -> None:
    write_bundle(tmp_path / "out", "long", "tiny", float_file)
    write_bundle(tmp_path / "out", "short", "tiny", float_file, buckets_tokens=(2, 3))
    found = compared(tmp_path / "out", cache=tmp_path / "cache", texts=texts)
    assert found.token_limit == 3
    assert found.texts.truncated == sum(len(text.split()) > 3 for text in TEXTS)
    assert any(f"long ({MAX_SEQUENCE})" in note and "at most 3 tokens" in note for note in found.notes)
    for name in ("long", "short"):
        measures = row(found, name).measures
        assert measures is not None and measures.centred_cosine_min > 0.999999


def test_without_fp32_the_golden_texts_serve(tmp_path: Path, texts: Path) -> None:
    elsewhere = write_float(tmp_path / "elsewhere")
    write_bundle(tmp_path / "out", "one", "tiny", elsewhere)
    cache = tmp_path / "cache"
    found = compared(tmp_path / "out", cache=cache)
    assert found.texts.count == 32
    assert row(found, "FP32 ONNX").ran_on == "not-run"
    measures = row(found, "one").measures
    # tiny_bundle's golden FP32 vectors carry noise of 0.005 in each coordinate.
    assert measures is not None and 0.98 < measures.centred_cosine_mean < 0.99999
    with pytest.raises(ConfigError, match="--against"):
        compared(tmp_path / "out", cache=cache, texts=texts)
    named = compared(tmp_path / "out", cache=cache, texts=texts, against=elsewhere)
    exact = row(named, "one").measures
    assert exact is not None and exact.centred_cosine_min > 0.999999


def test_the_texts_of_the_export_are_known_again(
    tmp_path: Path, float_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeq.data.splits import sha256_text, split

    def written(digest: str, name: str) -> Path:
        recorded = make_report(make_target())
        report = recorded.model_copy(update={"texts": recorded.texts.model_copy(update={"sha256": digest})})
        monkeypatch.setattr("tiny_card.make_report", lambda target: report.model_copy(update={"target": target.name}))
        write_bundle(tmp_path / name, name, "tiny", float_file)
        return tmp_path / name

    given = [" ".join(WORDS[i % 16] for i in range(start, start + 2 + start % 7)) for start in range(40)]
    texts = tmp_path / "given.txt"
    texts.write_text("\n".join(given), encoding="utf-8")
    fifth = split(given, sha256_text)[1]
    assert len(fifth) >= 3
    cache = tmp_path / "cache"
    assert compared(written(sha256_texts(given), "same"), cache=cache, texts=texts).notes == ()
    part = compared(written(sha256_texts(fifth), "fifth"), cache=cache, texts=texts)
    assert part.texts.count == len(fifth)
    assert any("calibrated on four fifths" in note for note in part.notes)
    default = compared(written("9" * 64, "other"), cache=cache)
    assert any("validated on other texts" in note for note in default.notes)


def test_too_few_texts_are_refused(tmp_path: Path, float_file: Path) -> None:
    write_bundle(tmp_path / "out", "one", "tiny", float_file)
    few = tmp_path / "few.txt"
    few.write_text("how\nhow\ndo\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="2 different texts"):
        compared(tmp_path / "out", cache=tmp_path / "cache", texts=few)


def test_data_sets_are_scored_in_every_runtime(
    tmp_path: Path, float_file: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "turned", AlteringBackend(lambda v: v * np.arange(DIM, dtype=np.float32)))  # type: ignore[arg-type]
    write_bundle(tmp_path / "out", "exact", "tiny", float_file)
    write_bundle(tmp_path / "out", "turned", "turned", float_file)
    pairs = [{"sentence1": TEXTS[i], "sentence2": TEXTS[-1 - i], "score": float(i % 4)} for i in range(7)]
    sts = tmp_path / "sts.jsonl"
    sts.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    beir = tmp_path / "beir"
    beir.mkdir()
    corpus = [{"_id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    (beir / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)), encoding="utf-8")
    (beir / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "reset my password"}), encoding="utf-8")
    (beir / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td4\t1\n", encoding="utf-8")
    found = compared(tmp_path / "out", cache=tmp_path / "cache", texts=texts, sts=sts, retrieval=beir)
    reference, exact, turned = (row(found, name) for name in ("FP32 ONNX", "exact", "turned"))
    assert (found.sts_pairs, found.retrieval_queries) == (7, 1)
    assert exact.sts_spearman == pytest.approx(reference.sts_spearman)
    assert turned.sts_spearman is not None and turned.sts_spearman != pytest.approx(reference.sts_spearman, abs=1e-3)
    assert exact.ndcg_at_10 == reference.ndcg_at_10
    words = word_vectors(float_file)
    by_hand = vectors(words)
    query = np.sum([words[word] for word in ("reset", "my", "password")], axis=0).astype(np.float64)
    rank = sorted(range(len(TEXTS)), key=lambda place: -cosine(query, by_hand[place])).index(4)
    assert exact.ndcg_at_10 == pytest.approx(1.0 / np.log2(rank + 2) if rank < 10 else 0.0)
    assert found.codes == ()


def test_codes_are_measured_in_every_runtime_and_between_them(
    tmp_path: Path, float_file: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "turned", AlteringBackend(lambda v: v * np.arange(DIM, dtype=np.float32)))  # type: ignore[arg-type]
    write_bundle(tmp_path / "out", "exact", "tiny", float_file)
    write_bundle(tmp_path / "out", "turned", "turned", float_file)
    beir = tmp_path / "beir"
    beir.mkdir()
    more = [" ".join(reversed(text.split()[1:])) or "how" for text in TEXTS]
    corpus = [{"_id": f"d{i}", "text": text} for i, text in enumerate([*TEXTS, *more])]
    (beir / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)), encoding="utf-8")
    (beir / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "reset my password"}), encoding="utf-8")
    (beir / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\td4\t1\n", encoding="utf-8")
    found = compared(
        tmp_path / "out", cache=tmp_path / "cache", texts=texts, retrieval=beir, codecs=("float32", "int8")
    )
    names = ["FP32 ONNX", "exact", "turned"]
    assert [(each.model, each.codec) for each in found.codes[:6]] == [
        (name, codec) for name in names for codec in ("float32", "int8")
    ]
    pairs = [f"queries {one}, documents {other}" for one in names for other in names if one != other]
    assert [each.model for each in found.codes[6:]] == pairs
    figures = {each.model: each for each in found.codes if each.codec == "float32"}
    assert figures["exact"].lost_by_model == 0 and figures["queries exact, documents FP32 ONNX"].recall_at_10 == 1
    assert figures["turned"].regret_at_10 > 0


def test_latency_takes_turns_and_is_the_devices_own(
    tmp_path: Path, float_file: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = RunsOn(machine="another", cpu_flags_all=(), cpu_flags_any=())
    write_bundle(tmp_path / "out", "here", "tiny", float_file)
    write_bundle(tmp_path / "out", "there", "tiny", float_file, runs_on=elsewhere)
    asked: list[Job] = []

    def timed_by_turns(
        jobs: dict[str, Job], rounds: int, warmup_rounds: int, goes_on: bool
    ) -> tuple[dict[str, Timed], dict[str, EdgeqError]]:
        asked.extend(jobs.values())
        milliseconds = [2.0 if job.model.endswith(".onnx") else 1.0 for job in jobs.values()]
        assert goes_on
        return {
            name: Timed(Turns((value,) * rounds, (value,) * 7), 5)
            for name, value in zip(jobs, milliseconds, strict=True)
        }, {}

    monkeypatch.setattr(turns, "timed_by_turns", timed_by_turns)
    found = compared(tmp_path / "out", cache=tmp_path / "cache", texts=texts, latency=True, threads=3)
    assert [Path(job.model).name for job in asked] == ["model.onnx", "here"]
    assert {(job.batch, job.sequence, job.threads) for job in asked} == {(1, MAX_SEQUENCE, 3)}
    (timed,) = row(found, "here").latency
    assert (timed.latency.p50_ms, timed.num_runs, timed.tokens) == (1.0, 7, MAX_SEQUENCE)
    assert timed.speedup is not None
    assert (timed.speedup.against, timed.speedup.pairs) == ("FP32 ONNX", timing.ROUNDS // 2)
    assert (timed.speedup.low, timed.speedup.median, timed.speedup.verdict) == (2.0, 2.0, "faster")
    assert row(found, "FP32 ONNX").latency[0].latency.p50_ms == 2.0
    assert row(found, "FP32 ONNX").latency[0].speedup is None
    there = row(found, "there")
    assert (there.ran_on, there.latency) == ("host-kernels", ())
    assert there.latency_reason is not None and "host-kernels" in there.latency_reason
    assert there.measures is not None


def test_a_runtime_that_cannot_be_timed_says_why(
    tmp_path: Path, float_file: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path / "out", "here", "tiny", float_file)

    whole = turns.TimedChild

    def child(job: Job) -> turns.TimedChild:
        if job.model.endswith(".onnx"):
            return whole(job)
        raise LoweringFailed("it died")

    monkeypatch.setattr(turns, "TimedChild", child)
    found = compared(tmp_path / "out", cache=tmp_path / "cache", texts=texts, latency=True)
    assert row(found, "here").latency_reason == "it died"
    assert row(found, "FP32 ONNX").latency != ()
    untimed = compared(tmp_path / "out", cache=tmp_path / "cache", texts=texts)
    assert "--latency" in str(row(untimed, "here").latency_reason)


def test_operators_and_layers_are_there_or_have_a_reason(tmp_path: Path, float_file: Path, texts: Path) -> None:
    write_bundle(tmp_path / "out", "one", "tiny", float_file)
    found = compared(tmp_path / "out", cache=tmp_path / "cache", texts=texts)
    assert row(found, "one").operators["Gather"] == {"float32": 1}
    assert row(found, "torch").operators_reason is not None
    (item,) = found.layers
    assert item.errors is None
    assert item.reason is not None and "run the export again" in item.reason.lower()
    assert "QDQ model (sha256 555555555555" in item.reason and "edgeq export tiny" in item.reason


def test_a_source_that_is_gone_leaves_torch_blank(tmp_path: Path, float_file: Path, texts: Path) -> None:
    write_bundle(tmp_path / "out", "one", "tiny", float_file)
    torch = row(compared(tmp_path / "out", cache=tmp_path / "cache", texts=texts), "torch")
    assert torch.ran_on == "not-run"
    assert torch.reason is not None and "the source cannot be opened: tiny: no such directory" in torch.reason


def test_gate_misses_are_said(tmp_path: Path, float_file: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = make_report(make_target(name="bad", gate=GATE.model_copy(update={"centred_cosine_min_min": 0.999})))
    from tiny_bundle import MEASURES, PLACEMENT

    from edgeq.evaluation import gate

    failures = gate.judge(MEASURES, PLACEMENT, failed.gate, "device")
    report = failed.model_copy(update={"status": "failed", "failures": failures})
    monkeypatch.setattr("tiny_card.make_report", lambda target: report)
    write_bundle(tmp_path / "out", "bad", "tiny", float_file, gate=failed.gate)
    found = compared(tmp_path / "out", cache=tmp_path / "cache", texts=texts)
    assert any("bad missed its gate" in note for note in found.notes)


@pytest.mark.tflite
def test_a_real_interpreter_stands_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")
    from tiny_card import write_tflite_bundle

    write_tflite_bundle(tmp_path / "out", "lite", buckets_tokens=(4, MAX_SEQUENCE))
    write_tflite_bundle(tmp_path / "out", "other-weights", buckets_tokens=(4, MAX_SEQUENCE), seed=1)
    found = compared(tmp_path / "out", cache=tmp_path / "cache")
    same, other = row(found, "lite"), row(found, "other-weights")
    assert same.measures is not None and other.measures is not None
    assert same.measures.centred_cosine_min > 0.999999
    assert other.measures.centred_cosine_mean < 0.9
    assert (same.ran_on, same.bundle is not None and same.bundle.backend) == ("device", "tflite")


@pytest.mark.export
def test_torch_gives_the_sources_vectors(tmp_path: Path) -> None:
    import tiny_source

    from edgeq.data.sessions import embed_batches
    from edgeq.data.tokenizer import Tokenizer
    from edgeq.data.tokens import batches
    from edgeq.frontend import locate
    from edgeq.frontend.torch.load import load_model, source_of
    from edgeq.frontend.torch.session import TorchSession, reopen

    folder = tiny_source.sentence_transformer(tmp_path / "model")
    located = locate.locate(str(folder))
    model = load_model(located)
    record = source_of(located, model)
    with pytest.raises(ConfigError, match="no such directory"):
        reopen(record)
    with pytest.raises(ConfigError, match="--model"):
        reopen(record.model_copy(update={"sha256": "0" * 64}), str(folder))
    session = TorchSession(reopen(record, str(folder)))
    texts = tiny_source.texts(7)
    tokens = Tokenizer.from_file(folder / "tokenizer.json", record.max_sequence).encode(texts)
    found = embed_batches(session, batches(tokens), len(texts))
    np.testing.assert_allclose(found, model.encode(texts), atol=1e-5)
    with pytest.raises(LoweringFailed, match="cannot load this model"):
        (folder / "config.json").write_text("{}", encoding="utf-8")
        TorchSession(located)
