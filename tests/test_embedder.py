from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import DIM, MAX_SEQUENCE, MEASURES, TEXTS, TinyBackend, make_bundle, make_report, make_target

from edgeq.backends.registry import BACKENDS
from edgeq.bundle import embedder
from edgeq.bundle.golden import read_golden
from edgeq.bundle.load import load
from edgeq.bundle.manifest import load_manifest
from edgeq.data.tokenizer import Tokenizer
from edgeq.errors import ConfigError, Unsupported
from edgeq.records import Manifest, RunsOn


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> TinyBackend:
    backend = TinyBackend()
    monkeypatch.setitem(BACKENDS, "tiny", backend)  # type: ignore[arg-type]
    return backend


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "out")[0]


def test_vectors_are_the_golden_ones_in_order(path: Path) -> None:
    loaded = load(path)
    golden = read_golden(path)
    vectors = loaded.encode(list(TEXTS))
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, golden.embeddings, atol=1e-6)
    np.testing.assert_allclose(loaded.encode(TEXTS[::-1], batch_size=3), golden.embeddings[::-1], atol=1e-6)
    assert not np.allclose(vectors, golden.embeddings[::-1], atol=1e-3)


def test_it_knows_its_model(path: Path, tiny: TinyBackend) -> None:
    loaded = load(str(path), threads=2)
    assert (loaded.dim, loaded.max_sequence) == (DIM, MAX_SEQUENCE)
    assert loaded.manifest == load_manifest(path)
    assert tiny.loads == [2]


def test_no_batch_is_larger_than_asked(path: Path, tiny: TinyBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    load_tiny = tiny.load

    def watched(*arguments: object, **options: object) -> object:
        session = load_tiny(*arguments, **options)  # type: ignore[arg-type]

        def embed(feeds):  # type: ignore[no-untyped-def]
            sizes.append(len(feeds.input_ids))
            return session(feeds)  # type: ignore[operator]

        return embed

    monkeypatch.setattr(tiny, "load", watched)
    load(path).encode(TEXTS, batch_size=5)
    assert max(sizes) <= 5
    assert sum(sizes) == len(TEXTS)


def test_no_texts_give_no_rows(path: Path) -> None:
    vectors = load(path).encode([])
    assert (vectors.shape, vectors.dtype) == ((0, DIM), np.float32)


def test_what_is_no_list_of_texts_is_refused(path: Path) -> None:
    loaded = load(path)
    with pytest.raises(ConfigError, match=r'Write encode\(\["..."\]\)'):
        loaded.encode("how do i")
    with pytest.raises(ConfigError, match=r"texts\[1\] is of type int"):
        loaded.encode(["how", 3])  # type: ignore[list-item]
    for texts, kind in ((None, "NoneType"), (3, "int"), (b"how", "bytes"), ({"how": 1}, "dict"), ({"how"}, "set")):
        with pytest.raises(ConfigError, match=f"texts is of type {kind}; a list of strings is needed"):
            loaded.encode(texts)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"texts\[1\] holds '.ud83d', half a character"):
        loaded.encode(["how", "a \ud83d"])
    for size in (0, True, 2.5, "8", None):
        with pytest.raises(ConfigError, match=f"batch_size is {size!r}; an integer of at least 1"):
            loaded.encode(["how"], batch_size=size)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="prompt is of type int"):
        loaded.encode(["how"], prompt=3)  # type: ignore[arg-type]


def test_a_cut_text_is_counted(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(path)
    with caplog.at_level(logging.WARNING, logger="edgeq"):
        whole = loaded.encode(["how " * MAX_SEQUENCE])
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING, logger="edgeq"):
        cut = loaded.encode(["how " * MAX_SEQUENCE + "password", "how"])
    assert caplog.messages == [f"1 of 2 texts are cut at {MAX_SEQUENCE} tokens"]
    np.testing.assert_allclose(cut[0], whole[0], atol=1e-6)


def test_prompts_go_before_each_text(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out", prompts={"query": "please send "})
    loaded = load(path)
    expected = loaded.encode(["please send it", "please send password"])
    np.testing.assert_array_equal(loaded.encode(["it", "password"], prompt_name="query"), expected)
    assert not np.allclose(loaded.encode(["it", "password"]), expected)
    with pytest.raises(ConfigError, match="prompt_name is 'passage'; the model has query"):
        loaded.encode(["it"], prompt_name="passage")


def test_the_default_prompt_is_used(tmp_path: Path) -> None:
    path, manifest = make_bundle(tmp_path / "out", prompts={"query": "please send "})
    session = BACKENDS["tiny"].load(manifest.artifact, path, manifest.target)
    source = manifest.source.model_copy(update={"default_prompt_name": "query"})
    plain = load(path)
    default = embedder.Embedder(
        session,
        Tokenizer.from_file(path / "tokenizer.json", plain.max_sequence),
        manifest.model_copy(update={"source": source}),
    )
    np.testing.assert_array_equal(default.encode(["it"]), plain.encode(["please send it"]))


def with_default(path: Path, manifest: Manifest, prompts: dict[str, str], default: str | None) -> embedder.Embedder:
    """Give an embedder of the same session whose model has other prompts."""
    session = BACKENDS["tiny"].load(manifest.artifact, path, manifest.target)
    source = manifest.source.model_copy(update={"prompts": prompts, "default_prompt_name": default})
    tokenizer = Tokenizer.from_file(path / "tokenizer.json", MAX_SEQUENCE)
    return embedder.Embedder(session, tokenizer, manifest.model_copy(update={"source": source}))


@pytest.mark.parametrize(
    ("prompts", "query", "document"),
    [
        ({"query": "please ", "document": "thanks "}, "please ", "thanks "),
        ({"query": "please ", "passage": "again "}, "please ", "again "),
        ({"query": "please ", "document": "", "passage": "again "}, "please ", ""),
        ({"please": "please "}, "", ""),  # the default is no role's prompt
    ],
)
def test_roles_take_the_prompts_that_sentence_transformers_takes(
    tmp_path: Path, prompts: dict[str, str], query: str, document: str
) -> None:
    path, manifest = make_bundle(tmp_path / "out")
    loaded = with_default(path, manifest, prompts, next(iter(prompts)))
    plain = load(path)
    for encode, prompt in ((loaded.encode_query, query), (loaded.encode_document, document)):
        np.testing.assert_array_equal(encode(["it"]), plain.encode([f"{prompt}it"]))
        np.testing.assert_array_equal(encode(["it"], prompt=""), plain.encode(["it"]))
    np.testing.assert_array_equal(loaded.encode(["it"]), plain.encode(["please it"]))
    np.testing.assert_array_equal(loaded.encode(["it"], prompt="where "), plain.encode(["where it"]))
    with pytest.raises(ConfigError, match="prompt_name is 'passages'; the model has"):
        loaded.encode_query(["it"], prompt_name="passages")
    with pytest.raises(ConfigError, match="give one of them"):
        loaded.encode(["it"], prompt_name=next(iter(prompts)), prompt="where ")


def test_a_model_without_prompts_has_none(path: Path) -> None:
    with pytest.raises(ConfigError, match="the model has no prompts"):
        load(path).encode(["it"], prompt_name="query")


def test_a_failed_bundle_is_loaded_only_when_asked(tmp_path: Path) -> None:
    measures = MEASURES.model_copy(update={"centred_cosine_min": 0.5})
    report = make_report(make_target(), status="failed", measures=measures, failures=("cosine min is 0.5",))
    path, _ = make_bundle(tmp_path / "out", report=report)
    with pytest.raises(Unsupported, match="missed the gate of tiny-target"):
        load(path)
    assert load(path, allow_failed=True).encode(["how"]).shape == (1, DIM)


def test_a_cpu_without_the_flags_is_refused_with_what_to_use_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make_target().runs_on.machine
    needs = RunsOn(machine=here, cpu_flags_all=(), cpu_flags_any=("no_such_flag", "nor_this"))
    target = make_target(runs_on=needs)
    path, _ = make_bundle(tmp_path / "out", target=target)
    plain = make_target(name="tiny-plain")
    foreign = make_target(name="other-backend", backend="other")
    monkeypatch.setattr("edgeq.targets.list_targets", lambda: (target, plain, foreign))
    with pytest.raises(Unsupported) as caught:
        load(path)
    message = str(caught.value)
    assert "no_such_flag" in message
    assert "nor_this" in message
    assert "Use a bundle for tiny-plain instead" in message
    assert "other-backend" not in message
    monkeypatch.setattr("edgeq.targets.list_targets", lambda: (target,))
    with pytest.raises(Unsupported, match="edgeq targets"):
        load(path)


def test_another_isa_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs_on = RunsOn(machine="another-isa", cpu_flags_all=("its_flag",), cpu_flags_any=())
    path, _ = make_bundle(tmp_path / "out", target=make_target(runs_on=runs_on))
    with caplog.at_level(logging.WARNING, logger="edgeq"):
        loaded = load(path)
    assert "tiny-target is made for another-isa" in caplog.text
    assert loaded.encode(["how"]).shape == (1, DIM)


def test_an_unknown_backend_and_no_bundle_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = make_bundle(tmp_path / "out")
    monkeypatch.delitem(BACKENDS, "tiny")
    with pytest.raises(ConfigError, match='backend is "tiny"'):
        load(path)
    with pytest.raises(ConfigError, match="no such folder"):
        load(tmp_path / "nowhere")
