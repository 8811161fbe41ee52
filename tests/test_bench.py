"""What tools/bench computes and writes around its measurements; nothing is measured here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.errors import LoweringFailed
from edgeq.evaluation.datasets import RetrievalSet, StsPairs

pytest.importorskip("psutil", reason="needs the extra `dev`")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from benchmark import __main__ as bench  # noqa: E402
from benchmark import clock, making, merging, npu, processes, quality, report, rows, runner, samples  # noqa: E402
from benchmark.figures import Blank, at, plain, restored  # noqa: E402


def whole(count: int = 40) -> samples.Sample:
    names = [str(number) for number in range(count)]
    pairs = StsPairs(tuple(f"a{n}" for n in names), tuple(f"b{n}" for n in names), np.arange(count, dtype=np.float64))
    # Question i is judged on the paragraph at the other end, so that thinning by position alone would lose it.
    qrels = tuple({count - 1 - number: 1} for number in range(count))
    return samples.Sample(pairs, RetrievalSet(tuple(f"d{n}" for n in names), tuple(f"q{n}" for n in names), qrels))


@pytest.mark.parametrize("every", [1, 2, 3, 8])
def test_thinning_keeps_what_the_kept_questions_are_judged_on(every: int) -> None:
    full, thin = whole(), samples.thinned(whole(), every)
    for query, judged in zip(thin.retrieval.queries, thin.retrieval.qrels, strict=True):
        (document,) = judged
        assert thin.retrieval.documents[document] == f"d{39 - int(query[1:])}"
    assert set(thin.retrieval.documents) >= set(full.retrieval.documents[::every])
    assert thin.pairs.first == full.pairs.first[::every]
    assert thin.pairs.scores.tolist() == full.pairs.scores[::every].tolist()
    assert set(thin.texts) <= set(full.texts)
    assert every == 1 or len(thin.texts) < len(full.texts)


def test_thinning_by_one_changes_nothing() -> None:
    assert samples.thinned(whole(), 1).texts == whole().texts
    assert samples.thinned(whole(), 1).retrieval == whole().retrieval


def test_a_killed_run_goes_on_at_the_model_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP32 and the first model were done when it was killed: neither is embedded again."""
    embedded: list[str] = []
    vectors = np.random.default_rng(0).normal(size=(120, 8)).astype(np.float32)
    killed = {"two"}

    class Runner(AbstractContextManager[Any]):
        buckets = ()

        def __init__(self, item: making.Made, threads: int) -> None:
            self.name = item.row.name

        def __exit__(self, *error: object) -> None:
            pass

    def embed(session: Runner, tokenizer: object, texts: Sequence[str]) -> quality.Vectors:
        if session.name in killed:
            raise KeyboardInterrupt
        embedded.append(session.name)
        return dict(zip(texts, vectors + 0.01 * len(session.name), strict=False))

    class Tokenizer:
        max_sequence = 256

        def encode(self, texts: Sequence[str]) -> None:
            pass

    monkeypatch.setattr(quality, "Runner", Runner)
    monkeypatch.setattr(quality, "embedded", embed)
    monkeypatch.setattr(quality.parity, "invariance", lambda *given: 0.5)
    made = []
    for name in ("base", "first", "two"):
        (tmp_path / name).write_text(name)
        made.append(making.Made(rows.Row(name, "onnxruntime"), tmp_path / name, {}))
    given: Any = (made[1:], made[0], whole(30), Tokenizer(), 120, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        quality.compare(*given)
    killed.clear()
    found = quality.compare(*given)
    assert embedded == ["base", "first", "two"]
    assert found["first"].figures == quality.compare(*given)["first"].figures
    assert found["first"].figures["invariance"] == 0.5 and found["first"].figures["texts"] == 120
    (tmp_path / "first").write_text("another model")
    quality.compare(*given)
    assert embedded == ["base", "first", "two", "first"]


def compared(vectors: dict[str, Sequence[float]]) -> quality.Compared:
    return quality.Compared({}, {text: np.array(vector, np.float32) for text, vector in vectors.items()})


def test_pairs_are_compared_on_the_texts_both_saw() -> None:
    # Around the mean (0, 0): two texts that `turned` swaps, and two that stay; `spun` has seen the first two alone.
    there = {"w": (1, 0), "x": (-1, 0), "y": (0, 1), "z": (0, -1)}
    models = {
        "float": compared(there),
        "one": compared({text: (2 * first, 2 * second) for text, (first, second) in there.items()}),
        "turned": compared({**there, "w": (-1, 0), "x": (1, 0)}),
        "spun": compared({"x": (-3, 4), "w": (3, -4)}),
        "peer": compared({"x": (-1, 0)}),
        "gone": quality.Compared({"texts": Blank("no such target")}, {}),
    }
    found = quality.pairwise(models, "float", {"one": "a", "turned": "a", "spun": "b", "gone": "b"})
    assert [(pair["first"], pair["second"], pair["texts"]) for pair in found["pairs"]] == [
        ("one", "turned", 4), ("one", "spun", 2), ("turned", "spun", 2),
    ]  # fmt: skip
    assert found["shared"] == {"a": pytest.approx(0.0)}  # two point the other way, two the same
    # On the two texts of all: `one` points as FP32 there, `turned` the other way, `spun` has 0.6.
    assert [pair["product"] for pair in found["pairs"][1:]] == [pytest.approx(1.0 * 0.6), pytest.approx(-1.0 * 0.6)]
    assert found["across"] == pytest.approx(0.0)  # 0.6 of `one` and `spun`, -0.6 of `turned` and `spun`


def test_pairs_of_vectors_that_all_point_one_way_are_told_apart() -> None:
    texts = [str(number) for number in range(8)]
    vectors = np.random.default_rng(0).normal(0.0, 0.01, (8, 4)) + 5.0
    swapped = vectors[[1, 0, 3, 2, 5, 4, 7, 6]]
    models = {name: compared(dict(zip(texts, rows.tolist(), strict=True))) for name, rows in
              (("float", vectors), ("one", vectors), ("two", swapped))}  # fmt: skip
    assert quality.pairwise(models, "float", {"one": "a", "two": "a"})["shared"]["a"] < 0.9


def test_the_worst_pair_decides_and_one_scheme_has_none_across() -> None:
    pair: dict[str, Any] = {"is_shared": True, "scheme": "a", "product": 0.5}
    found = quality.worst([pair | {"centred_cosine_mean": 0.9}, pair | {"centred_cosine_mean": 0.7}])
    assert found["shared"] == {"a": 0.7}
    assert isinstance(found["across"], Blank)


def test_ratios_are_taken_within_a_pair_of_rounds() -> None:
    first, second = clock.RATIOS["openvino_of_nncf"]
    # The machine slowed down in the middle: medians alone would say 1.
    found = clock.ratios({first: [1.0] * 6 + [2.0] * 10, second: [2.0] * 8 + [4.0] * 8})
    assert found == {
        "openvino_of_nncf": {
            "size": 8, "median": 0.5, "low": 0.5, "high": 1.0, "level": 0.99,
            "verdict": "too noisy: repeat on an idle machine",
        }
    }  # fmt: skip


def test_a_ratio_with_a_blank_is_that_blank() -> None:
    first, second = clock.RATIOS["openvino_of_nncf"]
    assert clock.ratios({first: Blank("no target"), second: [1.0]}) == {"openvino_of_nncf": Blank("no target")}


def test_models_take_turns_and_one_that_dies_is_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Runner(AbstractContextManager[Any]):
        def __init__(self, item: making.Made, threads: int) -> None:
            self.name = item.row.name

        def milliseconds(self, batch: int, sequence: int, runs: int, untimed: int) -> list[float]:
            log.append(self.name)
            if self.name == rows.AEQ:
                raise LoweringFailed("it died\nwhat to do")
            return [30.0 if self.name == rows.GEMM else 60.0] * runs

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(clock, "Runner", Runner)
    made = [making.Made(rows.Row(name, "onnxruntime"), Path("here"), {}) for name in (rows.GEMM, rows.FLOAT, rows.AEQ)]
    found = clock.rounds_of(made, 1, 16)
    assert found[rows.AEQ] == Blank("it died")
    assert log.count(rows.AEQ) == 1 and log.count(rows.GEMM) == log.count(rows.FLOAT)
    ratio = clock.ratios(found)["ort_of_float32"]
    assert (ratio["median"], ratio["low"], ratio["high"], ratio["verdict"]) == (0.5, 0.5, 0.5, "faster")
    assert clock.throughputs(made)["ratios"]["ort_of_float32"]["median"] == 2.0


def test_a_figure_behind_a_blank_is_that_blank() -> None:
    figures = {"quality": {"model": Blank("it died"), "other": {"cosine_mean": 0.5}}}
    assert at(figures, "quality", "model", "cosine_mean") == Blank("it died")
    assert at(figures, "quality", "other", "cosine_mean") == 0.5
    assert at(figures, "latency", "16") == Blank("not measured")


def test_blanks_stay_blanks_in_json_and_come_back() -> None:
    figures = {"a": Blank("why"), "b": [1.0, Blank("how")], 16: ("x", 2)}
    read = json.loads(json.dumps(plain(figures)))
    assert read == {"a": {"blank": "why"}, "b": [1.0, {"blank": "how"}], "16": ["x", 2]}
    assert restored(read) == {"a": Blank("why"), "b": [1.0, Blank("how")], "16": ["x", 2]}


def compared_quality(centred: float, date: str = "2026-01-02") -> dict[str, Any]:
    return {
        "run": {"date": date, "machine": "a machine", "versions": {"tool": "1.2"}}, "every": 1,
        "rows": {
            rows.GEMM: {"texts": 9, "centred_cosine_mean": centred, "centred_cosine_min": 0.99, "regret_mean": 0.0008,
                        "sts_percent": 100.1, "ndcg_percent": 99.0, "invariance": 1.0, "cosine_mean": 0.9991,
                        "promoted": 0, "size_mb": 23.5},
            rows.NNCF: {"texts": Blank("pip failed")},
        },
        "pairs": [{"first": rows.GEMM, "second": rows.INT, "texts": 9, "is_shared": False, "scheme": "a",
                   "centred_cosine_mean": 0.99, "product": 0.98}], "shared": {}, "across": 0.01,
    }  # fmt: skip


RATIO = {"size": 30, "median": 2.6, "low": 2.5, "high": 2.75, "level": 0.95, "verdict": "faster"}


def results() -> dict[str, Any]:
    static = Blank("its shapes are static with batch 1")
    return {
        "machine": "a machine", "date": "2026-01-02", "versions": {"tool": "1.2"},
        "threads": {rows.GEMM: 2, rows.NNCF: 2, rows.INT: 1},
        "making": {
            rows.GEMM: {"seconds": 12.345, "peak_gb": 0.5, "size_mb": 23.5, "ran_on": "device"},
            rows.NNCF: dict.fromkeys(("seconds", "peak_gb", "size_mb"), Blank("pip failed")),
        },
        "quality": {making.MINILM: compared_quality(0.9987)},
        "latency": {
            "models": {"16": {rows.GEMM: 1.2345, rows.NNCF: Blank("pip failed"), rows.INT: 3.0}},
            "ratios": {"16": {"openvino_of_nncf": Blank("pip failed")}},
        },
        "throughput": {"models": {rows.GEMM: 321.4, rows.INT: static}, "ratios": {"ort_of_float32": RATIO}},
    }  # fmt: skip


def npu_results() -> dict[str, Any]:
    vectors = {
        "texts": 200, "centred_cosine_mean": 0.99921, "centred_cosine_min": 0.9973, "regret_mean": 0.0009,
        "cosine_mean": 0.99941, "cosine_min": 0.9983, "invariance": 0.9999,
    }  # fmt: skip
    compiled = {"seconds": 3.21, "partitions": 1, "cpu_nodes": 0, "size_mb": 23.2}
    estimate = {
        "estimated_ms": 16.65, "clock_mhz": 1000.0, "cycles": 16650000, "system_config": "Mid",
        "memory_mode": "Dedicated", "arena_kib": 384.0, "sram_kib": 384.0, "dram_or_flash_kib": 22898.0,
        "host_operators": 1, "on_host": "GATHER",
    }  # fmt: skip
    return {
        "tools": {"QAIRT": "v2"},
        "quality": {
            rows.HTP16: {"size_mb": 23.2, "ran_on": "emulator", **vectors},
            rows.HTP8: {"size_mb": 23.2, "ran_on": "emulator", "texts": 200, "cosine_mean": 0.99831},
            rows.RK_PLAIN: {"size_mb": Blank("no toolkit"), "ran_on": "", "texts": Blank("no toolkit")},
        },
        "compiling": {rows.HTP16: {"32": compiled, "128": compiled}},
        "estimates": {rows.U85: {"128": estimate}},
    }


def alone(date: str = "2026-02-03") -> dict[str, Any]:
    return {"machine": "another machine", "date": date, "versions": {"tool": "1.3"}, "npu": npu_results()}


def test_what_stands_for_an_npu_is_shown_as_emulated_or_estimated() -> None:
    text = report.markdown(results() | {"npu": npu_results()})
    assert f"| {rows.HTP16} | emulator | 200 | 0.99921 | 0.9973 | 0.0009 | 0.9999 | 0.99941 |" in text
    assert "| 0.99831 |" in text and "200 | 200" not in text  # of an earlier run: what it did not give is blank
    assert "measured by a version that did not give it" in text
    assert f"| {rows.U85} | 128 | 16.65 | 1000 | Mid | Dedicated |" in text and "Vela *estimates*" in text
    assert f"| {rows.RK_PLAIN} |  | (" in text and ") no toolkit" in text
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 11
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_a_part_measured_later_stands_beside_the_others_with_its_own_date_and_machine(tmp_path: Path) -> None:
    report.write(results(), tmp_path)
    merged = merging.merged(report.read(tmp_path), alone(), ["npu"])
    assert merged["npu"] == npu_results() and merged["quality"] == restored(plain(results()["quality"]))
    assert (merged["date"], merged["machine"]) == ("2026-01-02", "a machine")
    text = report.markdown(merged)
    assert "apart from the rest on 2026-02-03, on another machine" in text
    before = report.markdown(results())
    assert text.startswith(before.split("## Goals")[0]) and "## Throughput" in text
    again = merging.merged(merged, alone("2026-03-04"), ["npu"])
    assert again["parts"]["npu"]["date"] == "2026-03-04" and again["date"] == "2026-01-02"


def test_rows_measured_again_stand_beside_the_others_of_the_same_day_and_machine() -> None:
    merged = merging.merged(results(), alone(), ["npu"])
    again = alone()
    again["npu"] = {"tools": {}, "quality": {rows.HTP16: {"texts": 3}}, "compiling": {}, "estimates": {}}
    found = merging.merged(merged, again, ["npu"], are_rows=True)["npu"]
    assert found["quality"] == npu_results()["quality"] | {rows.HTP16: {"texts": 3}}
    assert found["estimates"] == npu_results()["estimates"]
    for other in (alone("2026-02-04"), alone() | {"machine": "a third machine"}):
        with pytest.raises(SystemExit, match="measure all of it"):
            merging.merged(merged, other, ["npu"], are_rows=True)


def test_quality_of_each_model_stands_beside_that_of_others_and_replaces_its_own() -> None:
    base = {"machine": "another machine", "date": "2026-02-03", "versions": {"tool": "1.3"}}
    other = {**base, "model": "other", "quality": {"other": compared_quality(0.9)}, "making": {}, "threads": {}}
    merged = merging.merged(results(), other, ["quality"])
    assert {key: value for key, value in merged.items() if key not in ("quality", "parts")} == {
        key: value for key, value in results().items() if key != "quality"
    }  # making and threads belong to the latency of the run before; so does the heading's model
    assert merged["quality"] == results()["quality"] | other["quality"]
    text = report.markdown(merged)
    assert text.index(f"### {making.MINILM}") < text.index("### other") and f"| {rows.GEMM} | 9 | 0.9 |" in text
    own = {**base, "model": making.MINILM, "quality": {making.MINILM: compared_quality(0.8, "2026-05-06")}}
    again = merging.merged(merged, own, ["quality"])
    assert again["quality"] == own["quality"] | other["quality"]
    assert "2026-05-06, a machine; all texts." in report.markdown(again)
    with pytest.raises(SystemExit, match="npu: the report is of all-MiniLM-L6-v2; quality alone"):
        merging.merged(results(), {**alone(), "model": "other"}, ["npu"])


@pytest.mark.parametrize(("words", "said"), [
    (["--model", "all-minilm"], "--model is 'all-minilm'; all-MiniLM-L6-v2, all-mpnet-base-v2 or paraphrase-"),
    (["--model", "all-mpnet-base-v2"], "model.safetensors is missing; run tools/real_models all-mpnet-base-v2"),
    (["--data", "nowhere"], "nowhere/sts_dev.jsonl: is not there; --data needs sts_dev.jsonl, squad11dev"),
    (["--merge", "--only", "quality"], "bench.json: is not there; --data needs"),
])  # fmt: skip
def test_what_is_not_there_is_said_in_one_line_before_anything_is_made(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(*given: object) -> None:
        raise AssertionError("made something first")

    for name in samples.FILES:
        (tmp_path / "data" / name).mkdir(parents=True)
    monkeypatch.setattr(making.Workshop, "export", make)
    monkeypatch.setattr(making, "folder_of", lambda name: tmp_path / "models" / name)
    monkeypatch.setattr(making, "packaged_minilm", lambda: tmp_path)
    given = ["bench", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), *words]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert isinstance(ended.value.code, str) and said in ended.value.code and "\n" not in ended.value.code


@pytest.mark.parametrize("words", [["--only", "latency"], [], ["--only", "npu", "--only", "latency"]])
def test_parts_that_share_models_are_not_merged(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.options_of(["--data", "d", "--out", "o", "--merge", *words])
    assert "share no models" in capsys.readouterr().err
    assert bench.options_of(["--data", "d", "--out", "o", "--merge", "--only", "npu"]).merge
    with pytest.raises(SystemExit):
        bench.options_of(["--data", "d", "--out", "o", "--merge", "--only", "export", "--row", "GEMM"])


def test_texts_are_taken_evenly() -> None:
    assert npu.spread([str(n) for n in range(100)], 4) == ["0", "33", "66", "99"]
    assert npu.spread(["a", "b"], 4) == ["a", "b"]


def test_each_text_runs_in_the_smallest_length_that_it_fits() -> None:
    class Echo(runner.InBuckets):
        buckets = [4, 8]

        def run(self, bucket: int, ids: Any, mask: Any) -> Any:
            assert ids.shape == mask.shape == (1, bucket)
            return np.array([[bucket, ids.sum(), mask.sum()]], np.float32)

    ids = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    assert Echo()(ids, ids).tolist() == [[4, 3, 3], [8, 5, 5]]
    assert Echo()(ids[:1], ids[:1]).tolist() == [[8, 3, 3]]  # alone: at the length that it is given in


def test_a_blank_cell_shows_its_reason_below_and_once() -> None:
    text = report.markdown(results())
    assert f"| {rows.NNCF} |  | (1) | (1) | (1) |" in text
    assert f"| {rows.NNCF} |{' (1) |' * 10}" in text
    assert text.count("(1) pip failed") == 1
    assert "(2) its shapes are static with batch 1" in text
    assert f"| {rows.INT} | (2) |" in text


def test_the_tables_hold_date_machine_versions_and_figures() -> None:
    text = report.markdown(results())
    for piece in (
        "2026-01-02",
        "a machine",
        "tool 1.2",
        f"| {rows.GEMM} | 9 | 0.9987 | 0.99 | 0.0008 | 100.1 | 99 | 1 | 0.9991 | 0 | 23.5 |",
        f"| {rows.GEMM} | 2 | 1.23 |",
        f"| {rows.GEMM} / {rows.FLOAT} | 2.6 [2.5, 2.75] faster |",
    ):
        assert piece in text
    assert "## Export" not in text  # not measured, so not there


def test_all_tables_are_rectangular() -> None:
    blocks = [block for block in report.markdown(results()).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 8
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_report_is_written_as_both(tmp_path: Path) -> None:
    report.write(results(), tmp_path / "new")
    assert json.loads((tmp_path / "new" / "bench.json").read_text())["making"][rows.NNCF]["seconds"] == {
        "blank": "pip failed"
    }
    assert (tmp_path / "new" / "bench.md").read_text() == report.markdown(results())


def test_rows_are_chosen_by_a_part_of_their_name_with_what_they_follow() -> None:
    assert [row.name for row in bench.chosen(rows.PEERS, ["ai-edge-quantizer"])] == [rows.LITERT_FLOAT, rows.AEQ]
    assert bench.chosen(rows.PEERS, ["no such row"]) == []
    assert bench.chosen(rows.OWN, None) == list(rows.OWN)


def test_rows_name_what_exists() -> None:
    every = (*rows.OWN, *rows.MIRRORS, *rows.PEERS, *rows.NPU, *rows.NPU_PEERS)
    for row in every:
        assert row.runtime in runner.RUNTIMES
        if row.maker:
            assert (making.MAKERS / f"{row.maker}.py").is_file()
        if row.environment:
            assert rows.private(row.environment).requirements
    names = [row.name for row in every]
    assert len(set(names)) == len(names)


def test_pins_are_all_exact(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("# why\na==1\n\nb==2  # because\n")
    assert rows.pins(path) == ("a==1", "b==2")
    for row in rows.PEERS:
        if row.environment:
            assert all(pin.count("==") == 1 and "+" not in pin for pin in rows.private(row.environment).requirements)


def test_a_target_that_does_not_exist_is_skipped_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEQ_CACHE_DIR", str(tmp_path / "user"))
    workshop = making.Workshop(tmp_path / "work")
    made = workshop.own([rows.Row("future", "edgeq", target="no-such-target")])["future"]
    assert made.path is None and "no-such-target" in made.reason
    assert "no-such-target" in capsys.readouterr().err


def test_a_command_is_measured_and_its_last_words_kept(tmp_path: Path) -> None:
    program = "import sys, time; held = bytearray(60_000_000); time.sleep(0.5); print('one'); sys.exit('the reason')"
    ran = processes.measured([sys.executable, "-c", program], tmp_path / "log")
    assert ran.exit_code == 1
    assert processes.last_line(ran.log) == "the reason"
    assert ran.seconds >= 0.5 and ran.peak_gb >= 0.06
    assert processes.last_line("\r10 %\r\n \n") == "10 %"
    assert processes.last_line("") == "it said nothing"
    assert processes.first_line(ValueError("what is wrong\nwhat to do")) == "what is wrong"
