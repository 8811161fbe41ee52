from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from tiny_bundle import DIM, TEXTS, TinyBackend, make_bundle

from edgeq.backends.registry import BACKENDS
from edgeq.bundle.load import load
from edgeq.bundle.verify import verify
from edgeq.codecs.codec import Codec, read_codec
from edgeq.codecs.fit import codec_from_statistics, fit_codec
from edgeq.codecs.names import PLAIN, parse
from edgeq.codecs.onnx_output import OUTPUT, add_code_output
from edgeq.codecs.packing import pack, pack_trits, unpack, unpack_trits
from edgeq.codecs.rotations import itq, random_rotation
from edgeq.codecs.statistics import observe_vectors, read_statistics, statistics_bytes
from edgeq.errors import BundleCorrupt, ConfigError

WIDTH = 50
# Mean cosine of decoded vectors with the originals, of normal numbers: what theory gives, less a margin.
NEAREST = {
    "float32": 1.0, "float16": 1.0, "int8": 0.9999, "int8-centred": 0.9999, "int8-vector": 0.9999, "int4": 0.992,
    "int2": 0.93, "ternary": 0.87, "binary": 0.77,
    "binary-centred": 0.77, "binary-random": 0.77, "rabitq": 0.77, "rabitq2": 0.92, "rabitq3": 0.97,
    "rabitq4": 0.99,
}  # fmt: skip


def vectors(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors around a common mean; dimensions 3 and 7 are always zero."""
    rows = np.random.default_rng(seed).standard_normal((count, WIDTH)) + 0.3
    rows[:, [3, 7]] = 0.0
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


TRAIN, ROWS, QUERIES = vectors(400), vectors(300, 1), vectors(60, 2)
STATISTICS = observe_vectors(TRAIN, "test")


def plain(name: str) -> Codec:
    return codec_from_statistics(name, STATISTICS)


def scores(codec: Codec) -> NDArray[np.float32]:
    return codec.queries(QUERIES) @ codec.decode(codec.encode_bytes(ROWS)).T


def correlation(codec: Codec) -> float:
    """How the scores of a codec follow the dot products, within each query."""
    true, found = QUERIES @ ROWS.T, scores(codec)
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(true, found, strict=True)]))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_integers_survive_packing(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (9, 13)).astype(np.uint8)
    packed = pack(values, bits)
    assert packed.shape == (9, -(-13 * bits // 8))
    np.testing.assert_array_equal(unpack(packed, 13, bits), values)
    assert packed[0, 0] >> (8 - bits) == values[0, 0]  # the first in the highest bits


def test_trits_survive_packing() -> None:
    values = np.random.default_rng(0).integers(0, 3, (9, 13)).astype(np.uint8)
    assert pack_trits(values).shape == (9, 3)
    np.testing.assert_array_equal(unpack_trits(pack_trits(values), 13), values)


def test_dimensions_that_are_always_zero_are_left_out() -> None:
    assert STATISTICS.kept.tolist() == [place for place in range(WIDTH) if place not in (3, 7)]
    noisy = ROWS.copy()
    noisy[:, [3, 7]] = 1e-9 * np.random.default_rng(5).standard_normal((len(ROWS), 2))
    np.testing.assert_array_equal(plain("binary").encode(noisy), plain("binary").encode(ROWS))


@pytest.mark.parametrize("name", PLAIN)
def test_decoded_codes_are_near_the_vectors(name: str) -> None:
    codec = plain(name)
    codes = codec.encode_bytes(ROWS)
    assert codes.shape == (300, codec.size_bytes)
    turned, offsets = codec._turned(ROWS)
    decoded = codec.decode(codes)[:, : turned.shape[1]]
    cosines = np.sum(turned * decoded, axis=1) / np.linalg.norm(turned, axis=1) / np.linalg.norm(decoded, axis=1)
    assert cosines.mean() >= NEAREST[name] - 1e-6
    assert correlation(codec) >= NEAREST[name] - 0.02


def test_sizes_are_those_of_the_live_dimensions() -> None:
    sizes = {name: plain(name).size_bytes for name in PLAIN}
    assert sizes == {
        "float32": 192, "float16": 96, "int8": 48, "int8-centred": 48, "int8-vector": 52, "int4": 24, "int2": 12,
        "ternary": 14,
        "binary": 6, "binary-centred": 6, "binary-random": 6, "rabitq": 10, "rabitq2": 16, "rabitq3": 22, "rabitq4": 28,
    }  # fmt: skip


def test_rabitq_estimates_the_dot_product_itself() -> None:
    centred = QUERIES[:, STATISTICS.kept] - STATISTICS.mean
    true = QUERIES @ ROWS.T
    constant = ((QUERIES[:, STATISTICS.kept] - centred) * 0 + centred) @ STATISTICS.mean * 0
    found = scores(plain("rabitq4")) + constant[:, None]
    # <q, d> = <q - m, d - m> + <m, d - m> + <q, m>: the last is the same for all documents of a query
    found += (QUERIES[:, STATISTICS.kept] @ STATISTICS.mean)[:, None]
    assert abs(float(np.mean(found - true))) < 2e-3
    assert float(np.abs(found - true).max()) < 0.1


def test_the_int8_range_is_not_that_of_one_outlier() -> None:
    rows = vectors(4000)
    rows[0, 0] = 1.4 * np.abs(rows).max()
    assert observe_vectors(rows, "test").limit < 0.85 * float(np.abs(rows).max())


@pytest.mark.parametrize("width", [16, 48, 381, 7])
def test_the_rotation_is_orthogonal_and_mixes_all(width: int) -> None:
    turned = random_rotation(width)
    np.testing.assert_allclose(turned @ turned.T, np.eye(width), atol=1e-6)
    assert np.count_nonzero(turned) > 0.6 * width * width
    np.testing.assert_array_equal(turned, random_rotation.__wrapped__(width))


def test_itq_brings_vectors_nearer_to_their_signs() -> None:
    rows = (np.random.default_rng(0).standard_normal((500, 12)) * np.linspace(0.2, 2, 12)).astype(np.float32)

    def loss(turned: NDArray[np.float32]) -> float:
        made = rows @ turned
        return float(np.mean((np.sign(made) - made) ** 2))

    turned = itq(rows)
    np.testing.assert_allclose(turned @ turned.T, np.eye(12), atol=1e-5)
    assert loss(turned) < loss(random_rotation(12)) and loss(turned) < loss(np.eye(12, dtype=np.float32))


def test_trained_codecs_need_ten_thousand_vectors() -> None:
    with pytest.raises(ConfigError, match=r"pca8\+int4: is trained on at least 10000 texts, and few gives 300"):
        fit_codec("pca8+int4", ROWS, "few")
    with pytest.raises(ConfigError, match="is trained on a sample"):
        plain("binary-itq")


def test_pca_keeps_the_most_of_the_scores() -> None:
    rng = np.random.default_rng(3)
    mixing = rng.standard_normal((8, WIDTH))
    many = (rng.standard_normal((10_000, 8)) @ mixing + 0.05 * rng.standard_normal((10_000, WIDTH))).astype(np.float32)
    codec = fit_codec("pca8+int8", many, "many")
    assert codec.size_bytes == 8
    true = many[:50] @ many[50:250].T
    found = codec.queries(many[:50]) @ codec.decode(codec.encode_bytes(many[50:250])).T
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(true, found, strict=True)) > 0.999
    for name in ("pca8+rabitq2", "pca8+binary-itq", "pca8+ternary"):
        assert fit_codec(name, many, "many").encode(many[:3]).shape[0] == 3


def test_the_first_dimensions_have_length_one_again() -> None:
    codec = fit_codec("first16+float32", TRAIN, "test")
    head = codec.encode(ROWS)
    assert head.shape == (300, 14)
    np.testing.assert_allclose(np.linalg.norm(head, axis=1), 1.0, atol=1e-6)
    assert fit_codec("first16+int8", TRAIN, "test").size_bytes == 14
    with pytest.raises(ConfigError, match="keeps 64 dimensions, and the vectors have 50"):
        fit_codec("first64+int8", TRAIN, "test")


def test_a_codec_survives_its_file(tmp_path: Path) -> None:
    for name in ("int4", "rabitq2", "binary-random", "int8"):
        codec, path = plain(name), tmp_path / f"{name}.npz"
        path.write_bytes(codec.to_bytes())
        again = read_codec(path)
        assert again.sha256 == codec.sha256 and again.to_bytes() == codec.to_bytes()
        np.testing.assert_array_equal(again.encode(ROWS), codec.encode(ROWS))
    assert plain("int4").sha256 != plain("int2").sha256


@pytest.mark.parametrize("spoil", ["cut", "bit", "version", "other", "pickle"])
def test_a_spoilt_codec_is_refused(spoil: str, tmp_path: Path) -> None:
    path = tmp_path / "codec.npz"
    codec = plain("int4")
    path.write_bytes(codec.to_bytes())
    with np.load(path) as loaded:
        arrays = dict(loaded)
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif spoil == "bit":
        arrays["step"] = arrays["step"] * np.float32(1.01)
        np.savez(path, **arrays)
    elif spoil == "version":
        record = arrays["record"].tobytes().replace(b'"format": 1', b'"format": 2')
        np.savez(path, **(arrays | {"record": np.frombuffer(record, np.uint8)}))
    elif spoil == "other":
        np.savez(path, table=ROWS)
    else:
        np.savez(path, **(arrays | {"step": np.array([{}], object)}))
    with pytest.raises(BundleCorrupt, match=r"codec\.npz: "):
        read_codec(path)


@pytest.mark.parametrize("name", ["int9", "pq", "pca+int8", "first0+int8", "binary-odd", "", "pca8", "pq0"])
def test_no_such_codec(name: str) -> None:
    with pytest.raises(ConfigError, match="is none of float32"):
        parse(name)


def test_vectors_that_cannot_be_coded_are_named() -> None:
    codec = plain("int8")
    bad = ROWS.copy()
    bad[5, 2] = np.nan
    with pytest.raises(ConfigError, match=r"vector 5 \(from 0\) holds NaN"):
        codec.encode(bad)
    with pytest.raises(ConfigError, match=r"shape \[300, 20\]; \[n, 50\] is needed"):
        codec.encode(ROWS[:, :20])
    with pytest.raises(ConfigError, match="too large for float16"):
        plain("float16").encode(ROWS * 1e6)
    with pytest.raises(ConfigError, match="every vector is zero"):
        observe_vectors(np.zeros((20, 4), np.float32), "test")
    with pytest.raises(ConfigError, match=r"shape \[2, 3\]; \[n, 48\]"):
        codec.decode(np.zeros((2, 3), np.uint8))


def test_a_zero_vector_has_a_code() -> None:
    none = np.zeros((2, WIDTH), np.float32)
    for name in PLAIN:
        codec = plain(name)
        assert np.isfinite(codec.decode(codec.encode_bytes(none))).all()


# In a bundle


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(BACKENDS, "tiny", TinyBackend())  # type: ignore[arg-type]
    found = np.random.default_rng(0).standard_normal((64, DIM)).astype(np.float32) * 0.25
    return make_bundle(tmp_path / "out", codecs=statistics_bytes(observe_vectors(found, "test")))[0]


def test_encode_gives_codes(bundle: Path) -> None:
    loaded = load(bundle)
    floats = loaded.encode(TEXTS)
    np.testing.assert_array_equal(loaded.encode(TEXTS, codec="binary"), np.packbits(floats > 0, axis=1))
    codes = loaded.encode_query(TEXTS, codec="int8")
    assert codes.dtype == np.int8 and codes.shape == (len(TEXTS), DIM)
    path = bundle.parent / "codec.npz"
    path.write_bytes(loaded.codec("rabitq2").to_bytes())
    np.testing.assert_array_equal(loaded.encode(TEXTS, codec=path), loaded.encode(TEXTS, codec="rabitq2"))
    with pytest.raises(ConfigError, match="is none of"):
        loaded.encode(TEXTS, codec="binaer")


def test_the_lines_on_the_card_give_the_same_codes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (bundle / "README.md").read_text(encoding="utf-8")
    code = card.split("## Codes instead of floats")[1].split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 10
    loaded = load(bundle)
    names = {"vectors": loaded.encode(TEXTS)}
    monkeypatch.chdir(bundle)
    exec(compile(code, "card", "exec"), names)
    for name in ("binary", "int8", "int4"):
        np.testing.assert_array_equal(names[name], loaded.encode(TEXTS, codec=name))


def test_verify_walks_to_the_statistics(bundle: Path) -> None:
    assert verify(bundle).status == "passed"
    found = read_statistics(bundle / "codecs.npz")
    assert (found.dim, found.count, found.origin) == (DIM, 64, "test")
    (bundle / "codecs.npz").write_bytes(b"PK")
    with pytest.raises(BundleCorrupt, match=r"codecs\.npz"):
        verify(bundle)


def test_a_bundle_without_statistics_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "tiny", TinyBackend())  # type: ignore[arg-type]
    loaded = load(make_bundle(tmp_path / "out")[0])
    with pytest.raises(ConfigError, match="holds no statistics"):
        loaded.encode(TEXTS, codec="binary")


# Codes as an output of the model


@pytest.mark.parametrize("name", ["int8", "binary"])
def test_a_model_gives_the_codes_itself(name: str, bundle: Path) -> None:
    loaded = load(bundle)
    codec = loaded.codec(name)
    model = onnx.load(bundle / "onnx" / "model.onnx")
    add_code_output(model, codec)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    tokens = loaded.inputs.tokens(TEXTS[:1], "encode")
    feeds = {
        "input_ids": np.array(tokens.ids, np.int64), "attention_mask": np.ones((1, len(tokens.ids[0])), np.int64)
    }  # fmt: skip
    vectors, codes = session.run(["sentence_embedding", OUTPUT], feeds)
    np.testing.assert_array_equal(codes, codec.encode(vectors))
    with pytest.raises(ConfigError, match="sentence_embedding alone is needed"):
        add_code_output(model, codec)


@pytest.mark.openvino
def test_openvino_gives_the_same_codes(bundle: Path, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs the extra `openvino`")
    loaded = load(bundle)
    core = openvino.Core()
    rows = np.random.default_rng(0).integers(2, 18, (40, 5))
    feeds = {"input_ids": rows, "attention_mask": np.ones_like(rows)}
    for name in ("int8", "binary"):
        model = onnx.load(bundle / "onnx" / "model.onnx")
        add_code_output(model, loaded.codec(name))
        onnx.save(model, tmp_path / f"{name}.onnx")
        found = core.compile_model(core.read_model(tmp_path / f"{name}.onnx"), "CPU")(feeds)
        np.testing.assert_array_equal(found[OUTPUT], loaded.codec(name).encode(found["sentence_embedding"]))


def test_only_int8_and_bits_are_outputs(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="gives int8 or binary"):
        add_code_output(onnx.load(bundle / "onnx" / "model.onnx"), load(bundle).codec("rabitq"))
