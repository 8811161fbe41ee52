"""Compare every model's vectors with FP32's, and edgeq's with each other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from benchmark import samples
from benchmark.figures import Blank, Figures
from benchmark.making import Made, note
from benchmark.processes import first_line
from benchmark.runners import Runner
from benchmark.samples import Sample
from edgeq.data.sessions import Embeddings
from edgeq.data.tokenizer import Tokenizer
from edgeq.data.tokens import batches, sha256_texts
from edgeq.errors import EdgeqError
from edgeq.evaluation import parity
from edgeq.evaluation.tasks import evaluate_retrieval, evaluate_sts
from edgeq.evaluation.vector_measures import centred_cosines
from edgeq.system.files import replacing, sha256_file

_INVARIANCE_TEXTS = 200
TASKS = ("sts_percent", "ndcg_percent")

Vectors = dict[str, Embeddings]  # text -> float32[dim]


@dataclass(frozen=True)
class Compared:
    """Hold a model's figures and its vectors by text."""

    figures: Figures
    vectors: Vectors


def compare(
    made: Sequence[Made], reference: Made, whole: Sample, tokenizer: Tokenizer, limit: int | None,
    folder: Path | None = None,
) -> dict[str, Compared]:  # fmt: skip
    """Embed the texts with every model.

    Args:
        made: the models.
        reference: FP32; without figures in the result.
        whole: all evaluation texts; a row takes every so-many-th.
        tokenizer: the model's.
        limit: at most so many texts, and then no STS and no retrieval; None for all.
        folder: where vectors are kept, so that a run that was killed goes on where it was; None keeps none.
    """
    texts = whole.texts[:limit]
    expected = _stored(folder, reference, texts)[0]
    if not expected:
        with Runner(reference, reference.row.threads) as runner:
            note(f"quality: {reference.row.name}")
            expected = embedded(runner, tokenizer, texts)
        _store(folder, reference, texts, expected, 1.0)
    compared = {item.row.name: _compared(item, expected, whole, tokenizer, limit, folder) for item in made}
    return {reference.row.name: Compared({}, expected), **compared}


def fitting(tokenizer: Tokenizer, texts: Sequence[str], longest: int) -> list[str]:
    """Keep the texts that a model takes whole."""
    if longest >= tokenizer.max_sequence:
        return list(texts)
    ids = tokenizer.encode(texts).ids
    return [text for text, tokens in zip(texts, ids, strict=True) if len(tokens) <= longest]


def embedded(runner: Runner, tokenizer: Tokenizer, texts: Sequence[str]) -> Vectors:
    """Give each text's vector."""
    return dict(zip(texts, runner.embed_batches(batches(tokenizer.encode(texts))), strict=True))


def _stored(folder: Path | None, made: Made, texts: Sequence[str]) -> tuple[Vectors, float]:
    """Read what `_store` kept of the same model and texts: the vectors and the invariance; none where it kept none."""
    path = _place(folder, made, texts)
    if path is None or not path.is_file():
        return {}, 0.0
    note(f"quality: {made.row.name}: its vectors are there")
    with np.load(path, allow_pickle=False) as file:
        rows = file["rows"].tolist()
        return {texts[row]: vector for row, vector in zip(rows, file["vectors"], strict=True)}, float(file["smallest"])


def _store(folder: Path | None, made: Made, texts: Sequence[str], vectors: Vectors, smallest: float) -> None:
    path = _place(folder, made, texts)
    if path is None:
        return
    rows = [row for row, text in enumerate(texts) if text in vectors]
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, rows=rows, vectors=stacked(vectors, [texts[row] for row in rows]), smallest=smallest)


def _place(folder: Path | None, made: Made, texts: Sequence[str]) -> Path | None:
    """Name the file of a model's vectors by the model's own files and the texts."""
    if folder is None or made.path is None:
        return None
    files = [made.path] if made.path.is_file() else sorted(item for item in made.path.rglob("*") if item.is_file())
    digest = hashlib.sha256("".join(map(sha256_file, files)).encode() + sha256_texts(texts).encode())
    return folder / "quality" / f"{made.row.runtime}-{digest.hexdigest()[:24]}.npz"


def _compared(
    made: Made, expected: Vectors, whole: Sample, tokenizer: Tokenizer, limit: int | None, folder: Path | None
) -> Compared:
    sample = samples.thinned(whole, made.row.every)
    texts = sample.texts if limit is None else [text for text in sample.texts if text in expected]
    compared, longest = against(made, expected, texts, tokenizer, folder)
    figures, found = compared.figures, compared.vectors
    if not found:
        return compared
    if limit is not None:
        return Compared(figures | dict.fromkeys(TASKS, Blank("--limit leaves out STS and retrieval")), found)
    if longest < tokenizer.max_sequence:
        short = Blank(f"it takes at most {longest} tokens: longer texts are left out, and with them STS and retrieval")
        return Compared(figures | dict.fromkeys(TASKS, short), found)
    return Compared(figures | _tasks(sample, expected, found), found)


def against(
    made: Made, expected: Vectors, texts: Sequence[str], tokenizer: Tokenizer, folder: Path | None = None
) -> tuple[Compared, int]:
    """Embed texts with a model and hold its vectors against FP32's.

    Returns:
        The figures and the vectors (none where the model is not there or fails) of the texts that it takes whole, and
        how many tokens it takes.
    """
    if made.path is None:
        return Compared({"texts": Blank(made.reason)}, {}), 0
    note(f"quality: {made.row.name} ({len(texts)} texts)")
    try:
        with Runner(made, made.row.threads) as runner:
            longest = max(runner.buckets, default=tokenizer.max_sequence)
            whole = fitting(tokenizer, texts, longest)
            found, smallest = _stored(folder, made, whole)
            if not found:
                found = embedded(runner, tokenizer, whole)
                tokens = tokenizer.encode(whole[:: max(1, len(whole) // _INVARIANCE_TEXTS)])
                smallest = parity.invariance(runner, tokens, tokenizer.max_sequence, runner.buckets)
                _store(folder, made, whole, found, smallest)
        return Compared(_figures(whole, expected, found, smallest), found), longest
    except EdgeqError as error:
        return Compared({"texts": Blank(first_line(error))}, {}), 0


def _figures(texts: Sequence[str], expected: Vectors, found: Vectors, smallest: float) -> Figures:
    measures = parity.measure(stacked(expected, texts), stacked(found, texts), texts, smallest)
    return {
        "texts": len(texts),
        "centred_cosine_mean": measures.centred_cosine_mean,
        "centred_cosine_p01": measures.centred_cosine_p01,
        "centred_cosine_min": measures.centred_cosine_min,
        "regret_mean": measures.regret_mean,
        "regret_p99": measures.regret_p99,
        "cosine_mean": measures.cosine_mean,
        "cosine_min": measures.cosine_min,
        "top10_overlap": measures.top10_overlap,
        "invariance": measures.invariance_min,
        "worst_text": measures.worst_text,
    }


def _tasks(sample: Sample, expected: Vectors, found: Vectors) -> Figures:
    reference, artifact = (lambda texts, method, kept=kept: stacked(kept, texts) for kept in (expected, found))
    sts = evaluate_sts(sample.pairs, reference, artifact).spearman
    ndcg = evaluate_retrieval(sample.retrieval, reference, artifact).ndcg_at_10
    return dict(zip(TASKS, (sts.retention_percent, ndcg.retention_percent), strict=True))


def stacked(vectors: Vectors, texts: Sequence[str]) -> Embeddings:
    """Give float32[texts, dim]."""
    return np.stack([vectors[text] for text in texts])


def pairwise(compared: Mapping[str, Compared], reference: str, schemes: Mapping[str, str]) -> Figures:
    """Compare edgeq's runtimes with each other and with FP32, on the texts that both saw.

    Args:
        compared: every model.
        reference: FP32's name.
        schemes: edgeq's own models -> scheme.

    Returns:
        pairs: each pair with its mean centred cosine; shared: scheme -> the smallest of pairs that share it; across:
        the smallest of what a pair of two schemes has above the product of their centred cosines to FP32.
    """
    pairs: list[Figures] = []
    for first, second in combinations([name for name in schemes if name in compared and compared[name].vectors], 2):
        one, other = compared[first], compared[second]
        texts = [text for text in one.vectors if text in other.vectors]
        rows = [stacked(item.vectors, texts) for item in (compared[reference], one, other)]
        pairs.append({
            "first": first, "second": second, "texts": len(texts),
            "is_shared": schemes[first] == schemes[second], "scheme": schemes[first],
            "centred_cosine_mean": float(centred_cosines(rows[1], rows[2]).mean()),
            "product": float(centred_cosines(rows[0], rows[1]).mean() * centred_cosines(rows[0], rows[2]).mean()),
        })  # fmt: skip
    return {"pairs": pairs, **worst(pairs)}


def worst(pairs: Sequence[Figures]) -> Figures:
    """Give the smallest figures: of each scheme's pairs, and of pairs of two schemes."""
    shared: dict[str, float] = {}
    for pair in pairs:
        if pair["is_shared"]:
            shared[pair["scheme"]] = min(pair["centred_cosine_mean"], shared.get(pair["scheme"], 1.0))
    across = [pair["centred_cosine_mean"] - pair["product"] for pair in pairs if not pair["is_shared"]]
    none = Blank("fewer than two schemes were compared")
    return {"shared": shared, "across": min(across) if across else none}
