"""Parity takes further validation texts while a limit is undecided, and no text runs twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import GATE, PLACEMENT, TEXT_SET, make_target

from edgeq.data.tokens import Tokens
from edgeq.evaluation import parity
from edgeq.pipeline.growing_validation import growing
from edgeq.pipeline.measure_parity import Measured, measure_parity
from edgeq.pipeline.stage_results import Validation
from edgeq.records import Artifact, EndToEnd, FileRef, Target

SIZES = (300, 600, 1200)
random = np.random.default_rng(0)
TABLE = random.standard_normal((SIZES[-1], 32)).astype(np.float32)
TABLE /= np.linalg.norm(TABLE, axis=1, keepdims=True)
NOISE = random.standard_normal(TABLE.shape).astype(np.float32) * random.uniform(0.0, 0.02, (SIZES[-1], 1))
FOUND = (TABLE + NOISE).astype(np.float32)
FOUND /= np.linalg.norm(FOUND, axis=1, keepdims=True)
NAMES = tuple(f"text {row}" for row in range(SIZES[-1]))
EASY = GATE.model_copy(update={
    "centred_cosine_mean_min": 0.9, "centred_cosine_p01_min": 0.9, "centred_cosine_min_min": 0.9,
    "regret_mean_max": 0.5, "regret_p99_max": 1.0, "spearman_min": 0.5,
})  # fmt: skip


class CountingBackend:
    """Give each text, which is its own token, its vector; count how often it runs in a batch of further ones."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors
        self.ran: list[int] = []

    def load(self, artifact: Artifact, bundle: Path, target: Target, threads: int = 0) -> Any:
        def session(feeds: Any) -> np.ndarray:
            rows = feeds.input_ids[:, 0] - 1
            if feeds.input_ids.shape[1] == 1:  # invariance pads, too
                self.ran.extend(rows.tolist())
            return self.vectors[rows]

        return session


def measures_of(count: int) -> Any:
    return parity.measure(TABLE[:count], FOUND[:count], NAMES[:count], 1.0)


def parts(taken: list[int]) -> Iterator[Validation]:
    for size in SIZES:
        taken.append(size)
        samples = Tokens(tuple((row + 1,) for row in range(size)), 0, 0)
        yield Validation(NAMES[:size], samples, TEXT_SET, TABLE[:size])


def run(limit: float, **gate: Any) -> tuple[Measured, list[int], CountingBackend]:
    taken: list[int] = []
    backend = CountingBackend(FOUND)
    target = make_target(gate=EASY.model_copy(update={"centred_cosine_mean_min": limit, **gate}))
    artifact = Artifact(
        backend="tiny", target=target.name, files=(FileRef(path="a", sha256="0" * 64, size_bytes=1),),
        qdq_sha256="0" * 64, placement=PLACEMENT, tools={},
    )  # fmt: skip
    found = measure_parity(
        backend, artifact, Path(), target, parts(taken), 1, lambda done, total: None,  # type: ignore[arg-type]
        EndToEnd(status="not compared", reason="a test"),
    )  # fmt: skip
    return found, taken, backend


def test_what_is_decided_takes_no_further_texts() -> None:
    for limit, status in ((0.9, "passed"), (0.99999, "failed")):
        found, taken, _ = run(limit)
        assert (found.report.status, taken) == (status, [300])


def test_further_texts_run_while_a_mean_is_undecided_and_each_once() -> None:
    few, most = measures_of(300), measures_of(1200)
    limit = (few.centred_cosine_mean_low + few.centred_cosine_mean) / 2
    assert few.centred_cosine_mean_low < limit < most.centred_cosine_mean_low
    found, taken, backend = run(limit)
    assert found.report.status == "passed", found.report.failures
    assert taken[:2] == [300, 600] and found.report.measures is not None
    size = found.report.measures.texts
    assert size == taken[-1] and found.report.measures == measures_of(size).model_copy(
        update={"invariance_min": found.report.measures.invariance_min}
    )
    assert found.embeddings is not None and np.array_equal(found.embeddings, FOUND[:size])
    own = [row for row in backend.ran if row >= 300]
    assert sorted(own) == list(range(300, size))


def test_what_stays_undecided_says_how_many_more() -> None:
    each = [measures_of(size) for size in SIZES]
    limit = min(measures.centred_cosine_mean for measures in each) - 1e-9
    assert all(measures.centred_cosine_mean_low < limit for measures in each)
    found, taken, _ = run(limit)
    assert (found.report.status, taken) == ("failed", list(SIZES))
    assert ": undecided: about " in found.report.failures[0]


def test_another_limit_that_is_missed_ends_it() -> None:
    few = measures_of(300)
    limit = (few.centred_cosine_mean_low + few.centred_cosine_mean) / 2
    found, taken, _ = run(limit, spearman_min=0.999999)
    assert (found.report.status, taken) == ("failed", [300])


def test_a_part_is_embedded_without_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.pipeline.growing_validation.prepare", lambda items, *_: _Given(tuple(items)))
    asked: list[tuple[int, int]] = []

    def embed(items: Any, done: int) -> np.ndarray:
        asked.append((done, len(items)))
        return TABLE[done : done + len(items)]

    made = list(growing(NAMES, SIZES, "default", tmp_path, 1, embed))
    assert asked == [(0, 300), (300, 300), (600, 600)]
    assert all(np.array_equal(part.reference, TABLE[:size]) for part, size in zip(made, SIZES, strict=True))


class _Given:
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.samples, self.record = names, None, TEXT_SET
