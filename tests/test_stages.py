"""A cached stage can read its request alone, and every field of the request is part of the entry's key."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import encoder
import onnx
import pytest

import edgeq
from edgeq.data.plans import TextPlan
from edgeq.errors import ConfigError
from edgeq.frontend.locate import Located
from edgeq.frontend.onnx.find import OnnxFile
from edgeq.pipeline import stage_functions, stages
from edgeq.pipeline.stage_functions import CALIBRATION, QDQ_MODEL, REFERENCE
from edgeq.pipeline.stage_requests import CalibrationRequest, FloatModelRequest, QdqRequest, ReferenceRequest
from edgeq.pipeline.stage_results import Floats
from edgeq.quantization import schemes
from edgeq.records import Calibration, FileRef, FloatModel, Island, PassReport, Record, Smoothing, Source, TextSet
from edgeq.system import made_by
from edgeq.system.cache import Cache
from edgeq.system.files import file_ref
from edgeq.system.made_by import MadeBy
from edgeq.system.stage import InputFile, Request, Stage, files_of, folder_of, input_files, key, linked
from edgeq.targets import load_target

PACKAGE = Path(edgeq.__file__).parent
STAGES = [item for item in vars(stage_functions).values() if isinstance(item, Stage)]
SHA = "a" * 64


def ref(path: str) -> FileRef:
    return FileRef(path=path, sha256=SHA, size_bytes=3)


def full() -> dict[str, Request]:
    """Give a request of each stage, in which no field is empty or None."""
    made = MadeBy(
        code=SHA, python="3", packages=("numpy==1",), machine="x", cpu_flags=("avx",), threads=2, variables=("OMP_X=1",)
    )
    files = (InputFile(name="tokenizer.json", file=ref("/m/tokenizer.json")),)
    onnx_file = OnnxFile(Path("/m/a.onnx"), Path("/m/t.json"), Path("/m"), 64, True, "module", SHA, files, files)
    passed = PassReport(name="fold", rewrites=1, max_abs_error=0.5, near_misses=("why",))
    model = FloatModel(
        file=ref("/m/model.onnx"), source_sha256=SHA, inputs=("input_ids",), outputs=("sentence_embedding",), dim=4,
        max_sequence=64, max_abs_error=0.5, passes=(passed,), islands=(Island(operator="Pad", count=2, origin="a"),),
    )  # fmt: skip
    calibration = Calibration(
        file=ref("/m/calibration.npz"), float_model_sha256=SHA, seed=1,
        texts=TextSet(origin="a", sha256=SHA, count=2, tokens=9, truncated=1),
        smoothing=Smoothing(alphas={"norm": 0.5}, cosine_mean=0.9, candidates=3),
    )  # fmt: skip
    located = Located("name", Path("/m"), True, "mean", SHA, onnx_file, 16, "text", files, {"modeling.py": SHA})
    samples = {"float_model": model, "config": files, "texts": ("a", "b"), "images": files, "limit": 64}
    scheme = schemes.promote(schemes.find("w8a8-int", ""), ["product"], ["float"])
    return {
        "float-model": FloatModelRequest(made_by=made, located=located, hidden_state=True),
        "calibration": CalibrationRequest(made_by=made, **samples, origin="a", seed=1),
        "qdq-model": QdqRequest(
            made_by=made, equalized=model, calibration=calibration, tokens=ref("/m/tokens.json"), scheme=scheme
        ),
        "reference": ReferenceRequest(made_by=made, **samples),
    }


def changed(value: object, where: str = "") -> Iterator[tuple[str, object, bool]]:
    """Give copies of a value that differ in one place: the place, the copy, and whether it is only a file's path."""
    if isinstance(value, Record):
        for name in type(value).model_fields:
            for place, copy, is_path in changed(getattr(value, name), f"{where}.{name}"):
                of_file = isinstance(value, FileRef) and name == "path"
                yield place, value.model_copy(update={name: copy}), is_path or of_file
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            for place, copy, is_path in changed(getattr(value, field.name), f"{where}.{field.name}"):
                yield place, replace(value, **{field.name: copy}), is_path
    elif isinstance(value, tuple):
        assert value, f"{where} is empty in the example"
        yield f"{where} with one less", value[1:], False
        yield f"{where} in another order", (*value[1:], value[0], value[0]), False
        for place, copy, is_path in changed(value[0], f"{where}[0]"):
            yield place, (copy, *value[1:]), is_path
    elif isinstance(value, dict):
        yield where, {name: 0.25 for name in value}, False
    elif isinstance(value, Path):
        yield where, value / "elsewhere", True
    else:
        assert value is not None, f"{where} is None in the example"
        yield (
            where,
            not value if isinstance(value, bool) else value + (1 if isinstance(value, int | float) else "x"),
            False,
        )


CASES = [
    pytest.param(request, copy, is_path, id=f"{kind}{place}".replace(" ", "-"))
    for kind, request in full().items()
    for place, copy, is_path in changed(request)
]


@pytest.mark.parametrize(("request_", "copy", "is_path"), CASES)
def test_every_field_is_in_the_key_and_no_path_is(request_: Request, copy: Request, is_path: bool) -> None:
    assert (key(copy) == key(request_)) is is_path


def test_there_is_an_example_of_each_stage() -> None:
    assert {stage.kind: stage.request for stage in STAGES} == {kind: type(item) for kind, item in full().items()}


@pytest.mark.parametrize("stage", STAGES, ids=[stage.kind for stage in STAGES])
def test_a_stage_is_given_its_request_and_nothing_else(stage: Stage[Request]) -> None:
    parameters = inspect.signature(stage.make, eval_str=True).parameters
    assert list(parameters) == ["request", "folder", "progress"]
    assert parameters["request"].annotation is stage.request
    assert all(item.default is inspect.Parameter.empty for item in parameters.values())
    assert inspect.isfunction(stage.make) and stage.make.__closure__ is None
    assert stage.request.model_config["frozen"] and stage.request.model_config["extra"] == "forbid"


def test_the_stages_module_knows_no_options_no_environment_and_no_cache() -> None:
    tree = ast.parse(inspect.getsource(stage_functions))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            imported |= {f"{module}{alias.name}." for alias in node.names}
    unwanted = ("os.", "sys.", "edgeq.targets.", "edgeq.system.cache.", "edgeq.system.host.", "edgeq.pipeline.request.")
    assert "edgeq.pipeline.calibrate." in imported and not {name for name in imported if name.startswith(unwanted)}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global | ast.Nonlocal)]


def test_entries_are_made_by_stages_alone() -> None:
    """`Cache.entry` takes a name from its caller: only the cache, and the copying of whole entries, may call it."""
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "entry"
    }
    assert found == {"system/cache.py", "pipeline/bundling.py"}


def test_a_request_holds_nothing_whose_content_is_unknown() -> None:
    with pytest.raises(TypeError, match="set"):
        key(full()["reference"].model_copy(update={"limit": {1}}))


# In a process of its own: an audit hook stays until the end.
WATCHED = """
import json, os, sys
opened, watching = [], False
def hook(event, arguments):
    if watching and event in ("open", "os.listdir", "os.scandir"):
        opened.append(str(arguments[0]))
sys.addaudithook(hook)
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import pytest
tested_with = set(sys.modules)
import test_stages
def run(stage, request, cache):
    global watching
    folder = cache / stage.kind
    folder.mkdir(parents=True)
    watching = True
    stage.make(request, folder, lambda *_: None)
    watching = False
    return folder
names = test_stages.run_all(Path(sys.argv[1]), run)
print(json.dumps([opened, names, sorted(set(sys.modules) - tested_with)]))
"""


def run_all(work: Path, run: Callable[[Stage, Request, Path], Path]) -> list[str]:
    """Run the stages that need no torch on a small encoder; give the paths of the files that their requests name."""
    floats, texts = small_floats(work / "given")
    shared = {
        "made_by": made_by.own_code(), "float_model": floats.model, "config": input_files(floats.config),
        "texts": texts, "images": (), "limit": 32,
    }  # fmt: skip
    first = CalibrationRequest(**shared, origin="a", seed=0)
    folder = run(CALIBRATION, first, work / "made")
    equalized = stages.read_record(FloatModel, folder / "equalized.json", folder / "equalized.onnx")
    statistics = stages.read_record(Calibration, folder / "calibration.json", folder / "calibration.npz")
    second = QdqRequest(
        made_by=shared["made_by"], equalized=equalized, calibration=statistics,
        tokens=file_ref(folder / "tokens.json"), scheme=schemes.find("w8a8-int", ""),
    )  # fmt: skip
    run(QDQ_MODEL, second, work / "made")
    third = ReferenceRequest(**shared)
    run(REFERENCE, third, work / "made")
    refs = [ref for request in (first, second, third) for ref in files_of(request)]
    return [ref.path for ref in refs]


def small_floats(folder: Path, words: int = 60) -> tuple[Floats, tuple[str, ...]]:
    """Write a small encoder with a tokenizer of words; give it with texts."""
    (folder / "config").mkdir(parents=True)
    onnx.save(encoder.encoder(), folder / "model.onnx")
    write_tokenizer(folder / "config", 0)
    model = FloatModel(
        file=file_ref(folder / "model.onnx"), source_sha256=SHA, inputs=("input_ids", "attention_mask"),
        outputs=("sentence_embedding",), dim=encoder.DIM, max_sequence=32, max_abs_error=0.0, passes=(),
    )  # fmt: skip
    source = Source(
        name="small", kind="onnx", sha256=SHA, modules=(), inputs=model.inputs, dim=model.dim, max_sequence=32,
        prompts={}, default_prompt_name=None,
    )  # fmt: skip
    texts = tuple(" ".join(f"w{(row * 7 + place) % words}" for place in range(3 + row)) for row in range(24))
    return Floats(source, model, folder), texts


def write_tokenizer(config: Path, shift: int) -> None:
    """Write a tokenizer.json whose word n has the id 1 + (n + shift) % 60."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {"[UNK]": 0} | {f"w{row}": 1 + (row + shift) % 60 for row in range(60)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(config / "tokenizer.json"))


def test_a_stage_opens_what_its_request_names_and_imports_what_the_key_has(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    environment = os.environ | {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "home")}
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path / "work"), tests], capture_output=True, text=True, check=False,
        env=environment, cwd=tmp_path / "home",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    opened, named, modules = json.loads(done.stdout)
    code = (sys.prefix, sys.base_prefix, str(PACKAGE.parent), "/proc", "/sys", "/dev", "/etc", "/usr")
    own = (str(tmp_path / "work" / "made"), str(tmp_path / "home"))
    foreign = {path for path in opened if Path(path).is_absolute() and not path.startswith((*code, *own))}
    assert foreign <= set(named)
    assert [path for path in opened if path.startswith(str(tmp_path / "work" / "given"))]  # the hook does watch
    sources = metadata.packages_distributions()
    imported = {
        name.lower().replace("_", "-") for module in modules for name in sources.get(module.partition(".")[0], ())
    }
    keyed = {item.partition("==")[0] for item in made_by.own_code().packages}
    assert imported - keyed <= {"edgeq"} and {"numpy", "onnx", "tokenizers"} <= imported


def prepared(tmp_path: Path) -> tuple[Floats, tuple[str, ...], Cache]:
    floats, texts = small_floats(tmp_path / "given")
    return floats, texts, Cache(tmp_path / "cache")


def plan(texts: tuple[str, ...]) -> TextPlan:
    return TextPlan(texts, texts[:16], "a", "a")


def test_another_tokenizer_or_limit_with_the_same_weights_is_another_entry(tmp_path: Path) -> None:
    floats, texts, cache = prepared(tmp_path)
    target = load_target("integer-only-w8a16")
    made: list[tuple[Path, Path, bytes]] = []

    def make(floats: Floats) -> None:
        calibrated = stages.calibrated(floats, plan(texts), 0, cache, lambda *_: None)
        model = stages.quantized(target, calibrated, cache)
        vectors = stages.validation(floats, plan(texts), cache, floats.model.max_sequence)
        limit = floats.model.max_sequence
        assert model.max_sequence == calibrated.equalized.max_sequence == limit
        assert (calibrated.calibration.texts.truncated > 0) is (limit == 8)
        assert vectors.samples.longest == min(limit, 18)
        made.append((calibrated.folder, Path(model.file.path).parent, vectors.reference.tobytes()))

    make(floats)
    make(floats)
    assert made[0] == made[1]
    make(replace(floats, model=floats.model.model_copy(update={"max_sequence": 8})))
    write_tokenizer(floats.config, 5)
    make(floats)
    (floats.config / "tokenizer_config.json").write_text('{"do_lower_case": true}', encoding="utf-8")
    make(floats)
    assert len({item[0] for item in made}) == 4
    # What lies beside the tokenizer is read, and here it moves nothing: the same statistics give the same QDQ model.
    assert len({item[1] for item in made}) == len({item[2] for item in made}) == 3


def test_a_file_that_changes_while_it_is_read_makes_no_entry(tmp_path: Path) -> None:
    class TextRequest(Request):
        text: InputFile

    def make(request: TextRequest, folder: Path, progress: object) -> None:
        path = Path(request.text.file.path)
        (folder / "copy").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        path.write_text("new", encoding="utf-8")

    (tmp_path / "text").write_text("old", encoding="utf-8")
    cache, (file,) = Cache(tmp_path / "cache"), (InputFile(name="text", file=file_ref(tmp_path / "text")),)
    stage = Stage("copy", TextRequest, make)
    request = TextRequest(made_by=made_by.own_code(), text=file)
    with pytest.raises(ConfigError, match=r"text: was changed, or was replaced, while it was read"):
        cache.result(stage, request)
    assert not list(cache.entries())


def test_links_lead_to_the_named_files_alone(tmp_path: Path) -> None:
    for name in ("a.json", "sub/b.json", "c.json"):
        (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "given" / name).write_text(name, encoding="utf-8")
    files = [item for item in input_files(tmp_path / "given") if item.name != "c.json"]
    linked(files, tmp_path / "seen")
    assert sorted(path.relative_to(tmp_path / "seen").as_posix() for path in (tmp_path / "seen").rglob("*.json")) == [
        "a.json", "sub/b.json",
    ]  # fmt: skip
    assert (tmp_path / "seen" / "sub" / "b.json").read_text(encoding="utf-8") == "sub/b.json"
    assert folder_of(files) == tmp_path / "given"
    with pytest.raises(ValueError, match="does not end in"):
        folder_of([files[0].model_copy(update={"name": "other.json"})])


def test_the_packages_are_those_that_edgeq_requires() -> None:
    requirements = {
        "edgeq": ("NumPy>=1", "pillow>=10; extra == 'images'", "torch; extra == 'export'", "missing"),
        "numpy": ("inner-part<2", "docs-tool; extra == 'docs'"), "inner-part": ("numpy",), "pillow": (), "torch": (),
        "docs-tool": (), "other": (),
    }  # fmt: skip
    assert made_by.required(requirements) == {"numpy", "inner-part", "pillow"}
    named = {item.partition("==")[0] for item in made_by.own_code().packages}
    assert {"numpy", "onnx", "onnxruntime", "tokenizers", "onnx-ir"} <= named
    assert named <= {item.partition("==")[0] for item in made_by.foreign_code().packages}


def test_variables_that_choose_kernels_and_threads_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = made_by.own_code()
    monkeypatch.setenv("EDGEQ_CACHE_DIR", "/elsewhere")
    assert made_by.own_code() == before
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert made_by.own_code().variables == tuple(sorted((*before.variables, "OPENBLAS_CORETYPE=Haswell")))


def test_calibrated_is_found_again_in_another_place(tmp_path: Path) -> None:
    """Where the cache lies decides nothing: a copy of an entry serves the same request."""
    floats, texts, cache = prepared(tmp_path)
    first = stages.calibrated(floats, plan(texts), 0, cache, lambda *_: None)
    moved = tmp_path / "moved"
    floats.folder.rename(moved)
    again = floats.at(moved)
    assert stages.calibrated(again, plan(texts), 0, cache, lambda *_: None).folder == first.folder
