"""Image models from their configurations: prepared, exported, quantised, lowered, and as far from FP32 as asked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

pytestmark = pytest.mark.export
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")
pytest.importorskip("PIL", reason="needs the extra `images`")

import tiny_vision  # noqa: E402
from PIL import Image  # noqa: E402

import edgeq  # noqa: E402
from edgeq import cli  # noqa: E402
from edgeq.backends.registry import find  # noqa: E402
from edgeq.bundle.golden_images import read_golden_images  # noqa: E402
from edgeq.bundle.manifest import load_manifest  # noqa: E402
from edgeq.bundle.verify import verify  # noqa: E402
from edgeq.data import image_preprocessing, images  # noqa: E402
from edgeq.data.image_plans import plan_images  # noqa: E402
from edgeq.data.sessions import (  # noqa: E402
    embed_batches,  # noqa: E402
    unit,  # noqa: E402
)
from edgeq.data.tokens import batches  # noqa: E402
from edgeq.errors import BundleCorrupt, ConfigError, Unsupported  # noqa: E402
from edgeq.evaluation import parity, vector_measures  # noqa: E402
from edgeq.frontend import locate  # noqa: E402
from edgeq.frontend.float_model import _largest_error  # noqa: E402
from edgeq.frontend.torch import convert as torch_convert  # noqa: E402
from edgeq.graph import dialect  # noqa: E402
from edgeq.graph.float_session import FloatSession  # noqa: E402
from edgeq.passes import float_passes  # noqa: E402
from edgeq.pipeline import calibrate, structure, validate  # noqa: E402
from edgeq.pipeline.export import export  # noqa: E402
from edgeq.pipeline.request import ExportRequest  # noqa: E402
from edgeq.quantization import quantize, schemes, sensitivity, weight_losses  # noqa: E402
from edgeq.records import QdqModel  # noqa: E402
from edgeq.system.cache import Cache  # noqa: E402
from edgeq.system.files import file_ref  # noqa: E402
from edgeq.targets import load_target  # noqa: E402

TARGETS = ("x86-64-onnxruntime", "intel-openvino-cpu")
POOLING = {"vit": "cls", "dinov2": "mean", "resnet": "mean"}
SEEN, COMPARED = 48, 48


def pictures(count: int) -> list[Image.Image]:
    return [tiny_vision.picture(seed, 40 + seed % 37, 50 + seed % 23) for seed in range(count)]


def silent(*_: object) -> None:
    """Report to nobody."""


@pytest.fixture(scope="module", params=list(tiny_vision.MODELS))
def floats(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    """Export one model in this process: a child would import torch anew for each."""
    folder = tmp_path_factory.mktemp(request.param)
    name, directory = request.param, tiny_vision.MODELS[request.param](folder / "model")
    (folder / "raw").mkdir()
    located = locate.locate(str(directory), POOLING.get(name), tower=None if name in POOLING else "image")
    record = torch_convert.convert(located, folder / "raw", hidden_state=True)
    feeds, expected = torch_convert.load_probes(folder / "raw" / torch_convert.PROBES)
    rewritten, reports = float_passes.rewritten(onnx.load(folder / "raw" / torch_convert.RAW), feeds)
    dialect.verify(rewritten, name)
    error = _largest_error(rewritten, feeds, expected)
    how = image_preprocessing.read(folder / "raw" / torch_convert.CONFIG / image_preprocessing.CONFIG)
    return name, record, rewritten, reports, error, how


def test_the_graph_gives_torchs_vectors_of_images(floats) -> None:  # type: ignore[no-untyped-def]
    name, record, model, reports, error, _ = floats
    assert error <= 1e-5
    assert record.inputs == ("pixel_values",)
    done = {report.name: report.rewrites for report in reports}
    is_transformer = name != "resnet"
    assert done["patch_product"] == int(is_transformer)
    assert done["attention_pooling"] == int(name == "siglip")
    assert any(node.op_type == "Conv" for node in model.graph.node) != is_transformer
    assert model.graph.output[0].type.tensor_type.shape.dim[1].dim_value == record.dim


@pytest.mark.openvino
def test_integer_models_keep_the_vectors_apart(floats, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _, record, model, _, _, how = floats
    given = images.Images.of(pictures(SEEN + COMPARED), [""] * (SEEN + COMPARED), how)
    seen, compared = given.chosen(range(SEEN)), given.chosen(range(SEEN, SEEN + COMPARED))
    observed = calibrate.calibrate(model, seen, 0, silent)
    scheme = schemes.SCHEMES["w8a8-gemm"]
    made, integer, floating = quantize.quantize(observed.model, observed.statistics, scheme)
    path = tmp_path / "qdq.onnx"
    path.write_bytes(made.SerializeToString())
    qdq = QdqModel(
        file=file_ref(path), float_model_sha256="0" * 64, calibration_sha256="0" * 64, scheme=scheme,
        inputs=record.inputs, outputs=tuple(item.name for item in made.graph.output), dim=record.dim, max_sequence=1,
        integer_matmuls=integer, float_matmuls=floating,
    )  # fmt: skip
    assert len(integer) > 3
    _require_ranked(observed, made, integer, compared)
    reference = embed_batches(FloatSession.of(model), batches(compared), COMPARED)
    for name in TARGETS:
        target = load_target(name)
        backend = find(target.backend, name)
        assert not backend.rejections(qdq, target)
        (tmp_path / name).mkdir()
        artifact = backend.lower(qdq, target, tmp_path / name)
        assert artifact.placement.float_fallbacks == ()
        assert artifact.placement.integer_matmuls == len(integer)
        session = backend.load(artifact, tmp_path / name, target)
        vectors = embed_batches(session, batches(compared), COMPARED)
        measured = parity.measure(reference, vectors, [str(row) for row in range(COMPARED)], 1.0)
        assert measured.centred_cosine_mean >= 0.98, name
        assert measured.regret_mean <= 0.02, name
        swapped = vectors[[1, 0, *range(2, COMPARED)]]
        assert vector_measures.centred_cosines(reference, swapped).min() < 0.9
        assert parity.invariance(session, compared, 1) > 0.99999


def _require_ranked(
    observed: calibrate.Observed, made: onnx.ModelProto, integer: tuple[str, ...], compared: images.Images
) -> None:
    """Rank products and convolutions by their codes and their weights, and let all stay float."""
    scheme = schemes.SCHEMES["w8a8-gemm"]
    counterpart = quantize.QUANTIZERS[scheme.kind].rewrite(observed.model, observed.statistics, scheme)
    ranked = sensitivity.measure(counterpart, made, scheme, integer, compared, silent)
    assert sorted(name for site in ranked.sites for name in site.names) == sorted(integer)
    convolutions = {node.name for node in made.graph.node if node.op_type == "Conv"}
    assert {name for site in ranked.sites if site.is_convolution for name in site.names} == convolutions
    weights = weight_losses.measure(counterpart, made, [site.names for site in ranked.sites], compared, silent)
    assert ranked.rest < ranked.loss  # no activation has codes, and what a Relu cut off is cut off
    assert 0.1 < sum(weights) / ranked.rest < 10.0 and min(weights) > 0.0
    form = schemes.promote(scheme, (), integer, has_float_tables=True)
    floated = quantize.quantize(observed.model, observed.statistics, form)
    assert floated.integer_products == ()
    first, second = (
        embed_batches(FloatSession.of(each), batches(compared), COMPARED) for each in (counterpart, floated.model)
    )
    assert np.abs(unit(first) - unit(second)).max() < 1e-4


def processors() -> list[object]:
    from transformers import (
        BitImageProcessorPil,
        CLIPImageProcessorPil,
        MobileNetV2ImageProcessorPil,
        SiglipImageProcessorPil,
        ViTImageProcessorPil,
    )

    small = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 48}}
    return [
        ViTImageProcessorPil(), CLIPImageProcessorPil(), SiglipImageProcessorPil(), MobileNetV2ImageProcessorPil(),
        BitImageProcessorPil(), BitImageProcessorPil(**small), CLIPImageProcessorPil(do_normalize=False, **small),
    ]  # fmt: skip


@pytest.mark.parametrize("row", range(7))
def test_pixels_are_those_of_transformers_to_the_rounding_of_one(row: int, tmp_path: Path) -> None:
    processor = processors()[row]
    processor.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    how = image_preprocessing.read(tmp_path / image_preprocessing.CONFIG)
    step = how.rescale_factor / np.array(how.std)[:, None, None]
    for width, height in ((300, 200), (200, 300), (64, 64), (37, 501)):
        image = tiny_vision.picture(width, width, height)
        expected = processor(images=[image], return_tensors="np")["pixel_values"]  # type: ignore[operator]
        found = how.pixel_values(how.pixels(image)[None])
        assert found.shape == expected.shape
        assert np.abs((found - expected) / step).max() <= 1.01, (width, height)


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    processor = processors()[0]
    processor.do_flip_channel_order = True  # type: ignore[attr-defined]
    processor.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    with pytest.raises(Unsupported, match="do_flip_channel_order"):
        image_preprocessing.read(tmp_path / image_preprocessing.CONFIG)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    """Export the image tower of a model of two, from the command line."""
    folder = tmp_path_factory.mktemp("pipeline")
    directory = tiny_vision.clip(folder / "two towers")
    photos = tiny_vision.folder_of_pictures(folder / "photos", 110)
    targets = [word for name in TARGETS for word in ("--target", name)]
    code = cli.run(
        ["export", str(directory), "--tower", "image", "--images", str(photos), *targets, "--out", str(folder / "out"),
         "--keep-failed", "--no-cache", "--quiet"],
    )  # fmt: skip
    return code, directory, photos, folder / "out"


@pytest.mark.openvino
def test_a_bundle_of_an_image_model_verifies_and_embeds(made) -> None:  # type: ignore[no-untyped-def]
    _, _, photos, out = made
    paths = sorted(photos.iterdir())[:5]
    vectors = []
    for name in TARGETS:
        found = verify(out / name)
        assert found.max_abs_error is not None and found.max_abs_error < 1e-3
        manifest = load_manifest(out / name)
        assert manifest.float_model.inputs == ("pixel_values",)
        assert manifest.artifact.placement.float_fallbacks == ()
        model = edgeq.load(out / name, allow_failed=True)
        as_paths = model.encode([str(path) for path in paths])
        opened = [Image.open(path) for path in paths]
        assert np.array_equal(model.encode(opened), as_paths)
        assert np.allclose(model.encode([np.asarray(image) for image in opened], batch_size=2), as_paths, atol=1e-6)
        vectors.append(as_paths)
    assert np.sum(unit(vectors[0]) * unit(vectors[1]), axis=1).min() > 0.999
    with pytest.raises(ConfigError, match=r"images\[1\]"):
        model.encode([paths[0], photos / "missing.png"])
    with pytest.raises(ConfigError, match="list of images"):
        model.encode(str(paths[0]))


@pytest.mark.openvino
def test_another_preprocessing_is_found_out(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from edgeq.bundle.checksums import write_sums

    bundle = tmp_path / "bundle"
    shutil.copytree(made[3] / TARGETS[0], bundle)
    config = bundle / image_preprocessing.CONFIG
    config.write_text(config.read_text(encoding="utf-8").replace('"resample": 3', '"resample": 0'), encoding="utf-8")
    write_sums(bundle)
    with pytest.raises(BundleCorrupt, match="test card"):
        verify(bundle)


@pytest.mark.openvino
@pytest.mark.parametrize("target", TARGETS)
def test_the_cards_own_example_gives_the_same_vectors(made, target: str, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    _, _, photos, out = made
    card = (out / target / "README.md").read_text(encoding="utf-8")
    code = card.split("## Run it without edgeq")[1].split("```python\n")[1].split("```")[0]
    paths = [str(path) for path in sorted(photos.iterdir())[:2]]
    for name, path in zip(("photo.jpg", "another.jpg"), paths, strict=True):
        code = code.replace(name, path)
    monkeypatch.chdir(out / target)
    names: dict[str, object] = {}
    exec(compile(code, "card", "exec"), names)
    vectors = edgeq.load(out / target, allow_failed=True).encode(paths)
    assert np.allclose(names["vectors"], vectors, atol=1e-5)


def test_parity_is_measured_again_on_other_images(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _, _, photos, out = made
    bundle = out / TARGETS[0]
    artifact = bundle / load_manifest(bundle).artifact.files[0].path
    found = validate.validate(bundle, None, None, artifact, silent, photos)
    assert found.measures is not None and found.measures.cosine_min > 0.999
    with pytest.raises(ConfigError, match="Give a folder with --images"):
        validate.validate(bundle, None, None, artifact, silent)


def test_the_golden_images_are_those_that_were_compared(made) -> None:  # type: ignore[no-untyped-def]
    golden = read_golden_images(made[3] / TARGETS[0])
    assert len(golden.texts) == 16
    assert golden.codes.shape == (16, 3, tiny_vision.SIZE, tiny_vision.SIZE)
    manifest = load_manifest(made[3] / TARGETS[0])
    assert "--images" in manifest.command and "--tower" in manifest.command
    assert manifest.calibration.texts.count + len(golden.texts) <= 110


def test_backends_of_tokens_refuse_images_before_anything_is_calibrated(made) -> None:  # type: ignore[no-untyped-def]
    model = load_manifest(made[3] / TARGETS[0]).float_model
    for name in ("ethos-u55-256", "snapdragon-8-gen-3", "intel-openvino-npu"):
        target = load_target(name)
        scheme = schemes.find(target.scheme, name)
        found = find(target.backend, name).rejections(structure.unquantised(model.file, model.inputs, scheme), target)
        assert any("pixel_values" in item.detail for item in found), name


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, "--tower"),
        ({"tower": "image"}, "--images"),
        ({"tower": "image", "texts": Path("a.txt"), "images": Path("photos")}, "stands alone"),
        ({"tower": "text", "images": Path("photos")}, "takes texts"),
        ({"tower": "picture"}, "no such tower"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_done(made, changed, sentence, tmp_path) -> None:  # type: ignore[no-untyped-def]
    request = ExportRequest(
        model=str(made[1]), targets=(load_target(TARGETS[0]),), out=tmp_path, cache=Cache(tmp_path / "cache"), **changed
    )
    with pytest.raises(ConfigError, match=sentence):
        export(request, silent)


def test_a_fifth_of_the_images_validates_whatever_the_file_format(tmp_path: Path) -> None:
    folder = tiny_vision.folder_of_pictures(tmp_path / "photos", 110)
    Image.open(folder / "000.png").save(folder / "copy of 000.bmp")
    plan = plan_images(folder, None, 40, 0)
    assert len(plan.calibration) == 40
    names = {item.name for item in plan.calibration} | {item.name for item in plan.validation}
    assert len(names & {"000.png", "copy of 000.bmp"}) <= 1
    assert not {item.sha256 for item in plan.calibration} & {item.sha256 for item in plan.validation}


def test_an_image_on_both_sides_is_refused(tmp_path: Path) -> None:
    folder = tiny_vision.folder_of_pictures(tmp_path / "photos", 20)
    other = tiny_vision.folder_of_pictures(tmp_path / "others", 20, seed=500)
    Image.open(folder / "003.png").save(other / "again.bmp")
    with pytest.raises(ConfigError, match=r"003\.png and again\.bmp"):
        plan_images(folder, other, None, 0)


@pytest.mark.parametrize(("name", "content"), [("broken.png", b"no image"), (None, b"")])
def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, name: str | None, content: bytes) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    if name is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name or "holds no image"):
        plan_images(folder, None, None, 0)


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Run a verb; give its exit code and what it printed or refused with."""
    code = cli.run([*map(str, words), "--quiet"])
    said = capsys.readouterr()
    return code, said.out if code == 0 else said.err


def test_the_verbs_that_take_images(made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    bundle, vectors = passing(made[3] / TARGETS[0], tmp_path), tmp_path / "vectors.npy"
    few = tiny_vision.folder_of_pictures(tmp_path / "few", 5, seed=900)
    code, said = run(capsys, "embed", bundle, "--images", few, "--out", vectors, "--json")
    assert code == 0 and '"images": 5' in said, said
    expected = edgeq.load(bundle).encode(sorted(few.iterdir()))
    assert np.array_equal(np.load(vectors), expected) and np.ptp(expected, axis=0).max() > 1e-3
    code, said = run(capsys, "bench", bundle, "--alone", "--batch", "1,2", "--num-runs", "2", "--warmup-runs", "1")
    assert code == 0 and "artifact" in said, said


def passing(bundle: Path, folder: Path) -> Path:
    """Copy a bundle whose gate is as wide as random weights need."""
    from edgeq.bundle.checksums import write_sums

    copy = Path(shutil.copytree(bundle, folder / "bundle"))
    for name in ("manifest.json", "parity.json"):
        path = copy / name
        text = path.read_text(encoding="utf-8").replace('"status": "failed"', '"status": "passed"')
        path.write_text(text, encoding="utf-8")
    write_sums(copy)
    return copy


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("embed", "BUNDLE", "--texts", "TEXTS", "--out", "v.npy"), "embeds images, .* Give a folder with --images"),
        (("embed", "BUNDLE", "--texts", "TEXTS", "--images", "PHOTOS", "--out", "v.npy"), "--images, and no --texts"),
        (("embed", "BUNDLE", "--images", "TEXTS", "--out", "v.npy"), "a folder of image files is needed"),
        (("embed", "BUNDLE", "--images", "PHOTOS", "--prompt", "query", "--out", "v.npy"), "images have none"),
        (("bench", "BUNDLE", "--alone", "--sequence", "16"), "takes images. Leave it out"),
        (("validate", "BUNDLE", "--texts", "TEXTS", "--against", "BUNDLE"), "Give a folder with --images"),
        (("validate", "BUNDLE", "--texts", "PHOTOS", "--against", "BUNDLE"), "Give a folder with --images"),
        (("evaluate", "BUNDLE", "--sts", "PAIRS", "--against", "BUNDLE"), "edgeq validate BUNDLE --images FOLDER"),
        (("compare", "BUNDLE"), "edgeq validate BUNDLE --images FOLDER"),
        (("analyze", "MODEL", "--tower", "image", "--target", TARGETS[0]), "takes images, and products are ranked"),
        (("analyze", "MODEL", "--target", TARGETS[0]), "say with --tower"),
    ],
)  # fmt: skip
def test_the_verbs_that_do_not_take_images_say_what_does(  # type: ignore[no-untyped-def]
    made, words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, directory, photos, out = made
    (tmp_path / "texts.txt").write_text("red\n" * 3, encoding="utf-8")
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,score\na,b,1\nc,d,2\ne,f,4\n", encoding="utf-8")
    named = {
        "BUNDLE": out / TARGETS[0], "TEXTS": tmp_path / "texts.txt", "PAIRS": tmp_path / "pairs.csv",
        "PHOTOS": photos, "MODEL": directory, "v.npy": tmp_path / "v.npy",
    }  # fmt: skip
    code, found = run(capsys, *(named.get(word, word) for word in words))
    assert code == 2 and re.search(said, " ".join(found.split())), found
    assert "Traceback" not in found
