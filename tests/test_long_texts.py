"""Texts of 8,192 tokens: no table grows with the square of the longest text, and the artifacts run that long."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest

pytestmark = pytest.mark.export
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")

import architectures  # noqa: E402
import measured_architecture as measured  # noqa: E402
import tiny_source  # noqa: E402

from edgeq import targets  # noqa: E402
from edgeq.backends.registry import find  # noqa: E402
from edgeq.data.tokenizer import Tokenizer  # noqa: E402
from edgeq.data.tokens import Feeds  # noqa: E402
from edgeq.frontend import locate  # noqa: E402
from edgeq.frontend.torch import convert  # noqa: E402
from edgeq.graph import dialect  # noqa: E402
from edgeq.graph.float_session import FloatSession  # noqa: E402
from edgeq.passes import float_passes  # noqa: E402
from edgeq.pipeline import calibrate  # noqa: E402
from edgeq.quantization import quantize, schemes  # noqa: E402
from edgeq.records import QdqModel, Source  # noqa: E402
from edgeq.system.files import file_ref  # noqa: E402

LONG, WIDTH = 8192, 32
SHORTER = 1000  # no axis of weights is as long
_BODY = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
# Architecture -> its configuration, and how many rows of positions it stores for each token of the longest text.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "bert": (_BODY, 1),
    "modernbert": (_BODY | {"num_hidden_layers": 2, "local_attention": 128}, 0),
    "t5": ({"d_model": WIDTH, "d_kv": WIDTH, "d_ff": 64, "num_layers": 1, "num_heads": 1}, 0),
}


class Long(NamedTuple):
    name: str
    record: Source
    model: onnx.ModelProto
    observed: calibrate.Observed


def floats(name: str, longest: int, folder: Path) -> tuple[Source, onnx.ModelProto, Path]:
    """Export one architecture whose longest text is so long; no positions are looked up behind it."""
    config = KINDS[name][0] | ({"max_position_embeddings": longest} if name != "t5" else {})
    made = architectures.write(name, folder / f"{name}-{longest}", longest, changed=config)
    out = folder / f"{name}-{longest}-raw"
    out.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it exports
        record = convert.convert(locate.locate(str(made)), out, hidden_state=False)
    feeds, expected = convert.load_probes(out / convert.PROBES)
    model, _ = float_passes.rewritten(onnx.load(out / convert.RAW), feeds)
    dialect.verify(model, name)
    session = FloatSession.of(model)
    assert max(float(np.abs(v - session(f)).max()) for f, v in zip(feeds, expected, strict=True)) < 1e-5
    return record, model, out


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Long, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    record, model, out = floats(request.param, LONG, folder)
    tokenizer = Tokenizer.from_file(out / convert.CONFIG / "tokenizer.json", LONG)
    observed = calibrate.calibrate(model, tokenizer.encode(tiny_source.texts(32, seed=1)), 0, measured.silent)
    return Long(request.param, record, model, observed), folder


def test_only_a_table_of_positions_grows_with_the_longest_text(made: tuple[Long, Path]) -> None:
    (name, record, model, _), _ = made
    assert record.max_sequence == LONG
    long = [item for item in model.graph.initializer if max(item.dims, default=0) > SHORTER]
    assert sum(len(item.raw_data) for item in long) == KINDS[name][1] * LONG * WIDTH * 4
    assert sum(len(item.raw_data) for item in model.graph.initializer) < 2 * LONG * WIDTH * 4


@pytest.mark.parametrize(
    "target", ["x86-64-onnxruntime", pytest.param("intel-openvino-cpu", marks=pytest.mark.openvino)]
)
def test_the_artifact_embeds_a_text_of_8192_tokens(made: tuple[Long, Path], target: str, tmp_path: Path) -> None:
    (name, record, model, observed), _ = made
    if "openvino" in target:
        pytest.importorskip("openvino", reason="needs the extra `openvino`")
    chosen = targets.load_target(target)
    proto, integer, floating = quantize.quantize(
        observed.model, observed.statistics, schemes.find(chosen.scheme, target)
    )
    largest = max(int(np.prod(item.dims)) for item in proto.graph.initializer)
    assert largest <= LONG * WIDTH < LONG * LONG // 8
    onnx.save(proto, tmp_path / "qdq.onnx")
    qdq = QdqModel(
        file=file_ref(tmp_path / "qdq.onnx"), float_model_sha256="0" * 64, calibration_sha256="0" * 64,
        scheme=schemes.find(chosen.scheme, target), inputs=("input_ids", "attention_mask"),
        outputs=("sentence_embedding",), dim=record.dim, max_sequence=LONG, integer_matmuls=integer,
        float_matmuls=floating,
    )  # fmt: skip
    backend = find(chosen.backend, target)
    session = backend.load(backend.lower(qdq, chosen, tmp_path), tmp_path, chosen)
    ids = np.random.default_rng(0).integers(5, 40, (1, LONG), np.int64)
    feeds = Feeds(ids, np.ones_like(ids))
    (found,), (expected,) = session(feeds), FloatSession.of(model)(feeds)
    assert float(found @ expected) > 0.99 and np.linalg.norm(found) == pytest.approx(1.0, abs=1e-3)
    (other,) = session(Feeds(ids[:, : LONG // 2], np.ones((1, LONG // 2), np.int64)))
    assert np.abs(found - other).max() > 1e-4  # the second half of the text counts
