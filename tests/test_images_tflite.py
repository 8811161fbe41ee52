"""Image models in LiteRT: pixels in, as far from FP32 as asked, whole bundles, and what is no image."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

pytestmark = [pytest.mark.export, pytest.mark.tflite]
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")
pytest.importorskip("PIL", reason="needs the extra `images`")
pytest.importorskip("ai_edge_litert", reason="needs the extra `tflite`")

import tiny_vision  # noqa: E402
from PIL import Image  # noqa: E402

import edgeq  # noqa: E402
from edgeq import cli  # noqa: E402
from edgeq.backends.registry import find  # noqa: E402
from edgeq.backends.tflite import kernels  # noqa: E402
from edgeq.bundle.manifest import load_manifest  # noqa: E402
from edgeq.bundle.verify import verify  # noqa: E402
from edgeq.calibration.statistics import Statistics  # noqa: E402
from edgeq.data import image_preprocessing, images  # noqa: E402
from edgeq.data.batches import PixelFeeds  # noqa: E402
from edgeq.data.sessions import embed_batches, unit  # noqa: E402
from edgeq.data.tokens import batches  # noqa: E402
from edgeq.errors import ConfigError  # noqa: E402
from edgeq.evaluation import parity, vector_measures  # noqa: E402
from edgeq.frontend import locate  # noqa: E402
from edgeq.frontend.torch import convert as torch_convert  # noqa: E402
from edgeq.graph.float_session import FloatSession  # noqa: E402
from edgeq.passes import float_passes  # noqa: E402
from edgeq.pipeline import calibrate  # noqa: E402
from edgeq.quantization import convolution, quantize, schemes  # noqa: E402
from edgeq.records import QdqModel  # noqa: E402
from edgeq.system.files import file_ref  # noqa: E402
from edgeq.targets import load_target  # noqa: E402

TARGET = "raspberry-pi-litert"
POOLING = {"vit": "cls", "dinov2": "mean", "resnet": "mean", "mobilenet_v2": "mean"}
MODELS = {**tiny_vision.MODELS, "mobilenet_v2": tiny_vision.mobilenet_v2}
SEEN, COMPARED = 48, 48
# Mean centred cosine and regret@10 of `w8a8-int`, without promotion: channels sixty times the others, one query.
LIMITS = {"siglip": (0.97, 0.05), "mobilenet_v2": (0.97, 0.04)}


class Made:
    """Hold a model of images with its calibration, and make integer models and sessions of it."""

    def __init__(self, name: str, folder: Path) -> None:
        (folder / "raw").mkdir()
        directory = MODELS[name](folder / "model")
        located = locate.locate(str(directory), POOLING.get(name), tower=None if name in POOLING else "image")
        self.record = torch_convert.convert(located, folder / "raw", hidden_state=False)
        feeds, _ = torch_convert.load_probes(folder / "raw" / torch_convert.PROBES)
        self.model, _ = float_passes.rewritten(onnx.load(folder / "raw" / torch_convert.RAW), feeds)
        how = image_preprocessing.read(folder / "raw" / torch_convert.CONFIG / image_preprocessing.CONFIG)
        drawn = [tiny_vision.picture(seed, 40 + seed % 37, 50 + seed % 23) for seed in range(SEEN + COMPARED)]
        given = images.Images.of(drawn, [""] * len(drawn), how)
        self.compared = given.chosen(range(SEEN, len(drawn)))
        self.observed = calibrate.calibrate(self.model, given.chosen(range(SEEN)), 0, lambda *_: None)
        self.reference = embed_batches(FloatSession.of(self.model), batches(self.compared), COMPARED)
        self.name = name

    def quantized(self, scheme: str) -> quantize.Quantized:
        return quantize.quantize(self.observed.model, self.observed.statistics, schemes.SCHEMES[scheme])

    def measured(self, vectors: np.ndarray) -> parity.Measures:
        return parity.measure(self.reference, vectors, [str(row) for row in range(COMPARED)], 1.0)


@pytest.fixture(scope="module", params=list(MODELS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


def lowered(made: Made, scheme: str, folder: Path):  # noqa: ANN201
    """Write the .tflite file, and give the QDQ model's vectors, the session and the file."""
    model, integer, _ = made.quantized(scheme)
    path = folder / "qdq.onnx"
    path.write_bytes(model.SerializeToString())
    qdq = QdqModel(
        file=file_ref(path), float_model_sha256="0" * 64, calibration_sha256="0" * 64, scheme=schemes.SCHEMES[scheme],
        inputs=made.record.inputs, outputs=("sentence_embedding",), dim=made.record.dim, max_sequence=1,
        integer_matmuls=integer, float_matmuls=(),
    )  # fmt: skip
    target = load_target(TARGET)
    backend = find(target.backend, TARGET)
    assert not backend.rejections(qdq, target)
    artifact = backend.lower(qdq, target, folder)
    assert artifact.placement.integer_matmuls == len(integer)
    vectors = embed_batches(FloatSession.of(model), batches(made.compared), COMPARED)
    return vectors, backend.load(artifact, folder, target), folder / artifact.files[0].path


def test_pixels_go_in_and_the_vectors_stay_apart(made: Made, tmp_path: Path) -> None:
    expected, session, path = lowered(made, "w8a8-int", tmp_path)
    contents = kernels.read(path.read_bytes())
    assert contents.float_tensors == () and contents.operators[0].dtypes == ("uint8", "int8")
    assert {item.signature for item in contents.operators} == {"image"}
    vectors = embed_batches(session, batches(made.compared), COMPARED)
    assert (unit(vectors) * unit(expected)).sum(axis=1).min() > 0.98
    measured, (least, most) = made.measured(vectors), LIMITS.get(made.name, (0.985, 0.02))
    assert measured.centred_cosine_mean >= least and measured.regret_mean <= most, measured
    swapped = vectors[[1, 0, *range(2, COMPARED)]]
    assert vector_measures.centred_cosines(made.reference, swapped).min() < 0.9
    drawn = PixelFeeds(np.zeros((1, *made.compared.pixels.shape[1:]), np.float32))
    with pytest.raises(ConfigError, match="reads pixels from 0 to 255"):
        session(drawn)


def test_16_bits_are_as_good_as_fp32(made: Made, tmp_path: Path) -> None:
    _, session, _ = lowered(made, "w8a16-int", tmp_path)
    measured = made.measured(embed_batches(session, batches(made.compared), COMPARED))
    assert measured.centred_cosine_mean >= (0.994 if made.name == "mobilenet_v2" else 0.998), measured


@pytest.mark.parametrize("made", ["mobilenet_v2"], indirect=True)
def test_the_mean_that_rounding_weights_takes_goes_into_the_bias(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    corrected = made.quantized("w8a8-gemm").model
    rounded = convolution.rounded_kernel
    monkeypatch.setattr(convolution, "rounded_kernel", lambda *given: rounded(*given[:5], None, given[6]))
    plain = made.quantized("w8a8-gemm").model
    errors = [
        embed_batches(FloatSession.of(model), batches(made.compared), COMPARED) - made.reference
        for model in (corrected, plain)
    ]
    shares = [float((error.mean(0) ** 2).sum() / (error**2).sum(1).mean()) for error in errors]
    assert shares[0] < 0.08 < 0.12 < shares[1], shares  # of the error that all images have alike
    assert (errors[0] ** 2).sum() < 0.75 * (errors[1] ** 2).sum()


def test_what_lies_in_the_padding_has_no_mean() -> None:
    import onnx_ir as ir

    node = ir.node("Conv", [], attributes={"pads": [1, 1, 1, 1], "strides": [2, 2]})
    found = convolution._coverage(node, np.zeros((1, 1, 3, 3), np.float32), (4, 2))
    np.testing.assert_allclose(found, np.outer([0.5, 1.0, 1.0], [0.0, 1.0, 1.0]))
    assert convolution._coverage(node, np.zeros((1, 1, 3, 3), np.float32), (None, 2)) == 1.0


# --- a whole bundle ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("bundle")
    directory = tiny_vision.resnet(folder / "resnet")
    photos = tiny_vision.folder_of_pictures(folder / "photos", 110)
    code = cli.run(
        ["export", str(directory), "--pooling", "mean", "--images", str(photos), "--target", TARGET,
         "--out", str(folder / "out"), "--no-cache", "--quiet"],
    )  # fmt: skip
    assert code == 0
    yield folder / "out" / TARGET


def test_a_bundle_passes_its_gate_and_verifies(bundle: Path) -> None:
    assert load_manifest(bundle).status == "passed"
    verify(bundle)


def test_it_is_timed_and_embeds_from_the_command_line(bundle: Path, tmp_path: Path) -> None:
    few, vectors = tiny_vision.folder_of_pictures(tmp_path / "few", 3, seed=900), tmp_path / "vectors.npy"
    assert cli.run(["embed", str(bundle), "--images", str(few), "--out", str(vectors), "--quiet"]) == 0
    assert np.array_equal(np.load(vectors), edgeq.load(bundle).encode(sorted(few.iterdir())))
    runs = ["--alone", "--num-runs", "2", "--warmup-runs", "1", "--quiet"]
    assert cli.run(["bench", str(bundle), *runs]) == 0


def test_the_device_script_runs_it(bundle: Path) -> None:
    done = subprocess.run([sys.executable, "validate.py"], cwd=bundle, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "passed" in done.stdout, done.stderr[-2000:]


def test_the_cards_own_example_gives_the_same_vectors(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (bundle / "README.md").read_text(encoding="utf-8")
    code = card.split("## Run it without edgeq")[1].split("```python\n")[1].split("```")[0]
    paths = [str(path) for path in sorted((bundle.parent.parent / "photos").iterdir())[:2]]
    for name, path in zip(("photo.jpg", "another.jpg"), paths, strict=True):
        code = code.replace(name, path)
    monkeypatch.chdir(bundle)
    names: dict[str, object] = {}
    exec(compile(code, "card", "exec"), names)
    assert np.allclose(names["vectors"], edgeq.load(bundle).encode(paths), atol=1e-5)


def frame(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_grey_alpha_and_large_frames_are_converted(bundle: Path) -> None:
    loaded = edgeq.load(bundle)
    grey = frame(40, 50)
    colours = np.repeat(grey[:, :, None], 3, axis=2)
    (one, other), (plain, opaque) = (
        loaded.encode([grey, colours]),
        loaded.encode([Image.fromarray(colours), Image.fromarray(colours).convert("RGBA")]),
    )
    assert np.array_equal(one, other) and np.array_equal(plain, opaque) and np.array_equal(one, plain)
    assert np.isfinite(loaded.encode([frame(2160, 3840, 3)])).all()  # a video frame of 4K


@pytest.mark.parametrize(
    "wrong",
    [frame(40, 50, 4), frame(3, 40, 50), frame(1, 40, 50, 3), frame(0, 50, 3), np.ones((40, 50, 3), np.float32)],
)
def test_what_is_no_image_is_refused_in_one_line(bundle: Path, wrong: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"uint8\[height, width, 3\] is needed") as error:
        edgeq.load(bundle).encode([wrong])
    assert "\n" not in str(error.value)


def test_statistics_have_one_number_for_each_channel(made: Made) -> None:
    seen = [item for item in made.observed.statistics.values() if item.moment is not None]
    assert all(isinstance(item, Statistics) and item.mean is not None for item in seen)
