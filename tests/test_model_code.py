"""A model's own code is named and refused; where it is trusted it runs in the child, and the manifest says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgeq import cli
from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend import locate, model_code

pytest.importorskip("torch", reason="needs the extra `export`")
pytest.importorskip("sentence_transformers", reason="needs the extra `export`")

import tiny_modules  # noqa: E402
import tiny_source  # noqa: E402
from sentence_transformers.sentence_transformer import modules as own  # noqa: E402

import edgeq  # noqa: E402
from edgeq.bundle.manifest import load_manifest  # noqa: E402
from edgeq.frontend.float_model import write_float_model  # noqa: E402
from edgeq.frontend.torch import convert  # noqa: E402
from edgeq.frontend.torch.session import reopen  # noqa: E402
from edgeq.system.cache import Cache  # noqa: E402

pytestmark = pytest.mark.export

CONFIGURATION = """from transformers import BertConfig


class MyConf(BertConfig):
    model_type = "my_enc"
"""
MODEL = """import os
from pathlib import Path

from transformers import BertModel

from .configuration_my import MyConf

Path(os.environ["EDGEQ_TESTS_RAN"]).write_text(str(os.getpid()))


class MyModel(BertModel):
    config_class = MyConf
"""
TOKENIZER = """from transformers import PreTrainedTokenizerFast


class MyTok(PreTrainedTokenizerFast):
    pass
"""
POOLING = """from sentence_transformers.sentence_transformer.modules import Pooling


class MyPooling(Pooling):
    def forward(self, features):
        return super().forward(features)
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_source.body(tmp_path_factory.mktemp("code") / "body", layers=1)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the file into which a model's code writes the process in which it ran."""
    monkeypatch.setenv("EDGEQ_TESTS_RAN", str(tmp_path / "ran"))
    return tmp_path / "ran"


def update(path: Path, **said: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | said), encoding="utf-8")


def with_code(plain: Path, folder: Path, repository: str = "", model_type: str = "my_enc") -> Path:
    """Write a sentence-transformers directory whose config.json names code, in it or in another repository."""
    tiny_modules.save(folder, own.Pooling(64), own.Normalize(), encoder=plain)
    named = {"AutoConfig": "configuration_my.MyConf", "AutoModel": "modeling_my.MyModel"}
    update(folder / "config.json", model_type=model_type, auto_map={key: repository + at for key, at in named.items()})
    if not repository:
        write_code(folder)
    return folder


def write_code(folder: Path) -> None:
    (folder / "configuration_my.py").write_text(CONFIGURATION, encoding="utf-8")
    (folder / "modeling_my.py").write_text(MODEL, encoding="utf-8")


def test_code_is_named_and_refused_with_both_ways_out(
    plain: Path, tmp_path: Path, ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, repository in (("local", ""), ("elsewhere", "acme/my-code--")):
        folder = with_code(plain, tmp_path / name, repository)
        for verb in (["check"], ["export", "--out", str(tmp_path / "out"), "--dry-run"], ["analyze"]):
            assert cli.run([*verb, str(folder), "--target", "x86-64-onnxruntime", "--quiet"]) == Unsupported.exit_code
            said = capsys.readouterr().err
            assert "MyModel in modeling_my.py" in said and "runs no model's code unasked" in said
            assert "--trust-remote-code" in said and "edgeq.export(AutoModel" in said
            assert ("of the hub repository acme/my-code" in said) == bool(repository)
        with pytest.raises(Unsupported, match="runs no model's code unasked"):
            edgeq.export(folder, ["x86-64-onnxruntime"], tmp_path / "out", dry_run=True)
    with pytest.raises(ConfigError, match=r"acme/my-code, which is not in the local cache.*hf download acme/my-code"):
        locate.locate(str(tmp_path / "elsewhere"), trust_remote_code=True)
    (tmp_path / "local" / "modeling_my.py").unlink()
    with pytest.raises(ConfigError, match=r"names MyModel in modeling_my\.py .* has no such file"):
        locate.locate(str(tmp_path / "local"), trust_remote_code=True)
    assert not ran.exists()


def test_trusted_code_runs_in_the_child_alone_and_the_bundle_says_so_without_holding_it(
    plain: Path, tmp_path: Path, ran: Path
) -> None:
    folder = with_code(plain, tmp_path / "local")
    (made,) = edgeq.export(
        folder, ["x86-64-onnxruntime"], tmp_path / "out", tiny_source.texts(120), cache=Cache(tmp_path / "cache"),
        trust_remote_code=True, keep_failed=True,
    )  # fmt: skip
    assert ran.read_text(encoding="utf-8") != str(os.getpid())
    assert made.parity is not None and made.parity.cosine_mean > 0.99
    bundle = Path(made.path)
    source = load_manifest(bundle).source
    assert list(source.code) == ["configuration_my.py", "modeling_my.py"]
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert "`modeling_my.py`) was trusted to run" in card and "backend=" not in card
    assert "--trust-remote-code" in load_manifest(bundle).command
    assert not [path for path in bundle.rglob("*.py") if path.name != "validate.py"]
    assert not any("auto_map" in path.read_text(encoding="utf-8") for path in bundle.glob("*config.json"))
    assert edgeq.load(bundle, allow_failed=True).encode(["the red tree"]).shape == (1, 64)
    with pytest.raises(Unsupported, match="runs no model's code unasked"):
        reopen(source, str(folder))
    assert reopen(source, str(folder), trust_remote_code=True).code == source.code


def test_code_of_another_repository_comes_from_the_local_cache_and_decides_the_hash(
    plain: Path, tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "a" * 40
    repository = tmp_path / "hub" / "models--acme--my-code"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    (repository / "snapshots" / commit).mkdir(parents=True)
    write_code(repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))  # read by a process of its own alone: no fork of one
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = with_code(plain, tmp_path / "elsewhere", "acme/my-code--")
    found = locate.locate(str(folder), trust_remote_code=True)
    assert list(found.code) == ["acme/my-code--configuration_my.py", "acme/my-code--modeling_my.py"]
    (tmp_path / "raw").mkdir()
    request = {"located": locate.to_json(found), "out_dir": str(tmp_path / "raw"), "hidden_state": True}
    command = [sys.executable, "-m", convert.__name__, json.dumps(request)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        said, _ = child.communicate()
    assert child.returncode == 0, said
    assert json.loads((tmp_path / "raw" / convert.SOURCE).read_bytes())["code"] == found.code
    assert ran.exists()
    with (repository / "snapshots" / commit / "modeling_my.py").open("a", encoding="utf-8") as file:
        file.write("# another line\n")
    assert locate.locate(str(folder), trust_remote_code=True).sha256 != found.sha256


def test_transformers_own_class_takes_the_place_of_code_only_where_it_is_told_to(
    plain: Path, tmp_path: Path, ran: Path
) -> None:
    known = with_code(plain, tmp_path / "known", model_type="bert")
    with pytest.raises(Unsupported, match="--no-trust-remote-code takes those"):
        locate.locate(str(known))
    instead = locate.locate(str(known), trust_remote_code=False)
    (tmp_path / "float").mkdir()
    source, _ = write_float_model(instead, tmp_path / "float")
    assert not source.code and not ran.exists()
    assert instead.sha256 != locate.locate(str(known), trust_remote_code=True).sha256
    unknown = with_code(plain, tmp_path / "unknown")
    (tmp_path / "none").mkdir()
    with pytest.raises(Unsupported, match="transformers has no class of its own"):
        write_float_model(locate.locate(str(unknown), trust_remote_code=False), tmp_path / "none")


def test_code_of_tokenizers_and_of_modules_is_found_and_runs_too(plain: Path, tmp_path: Path, ran: Path) -> None:
    folder = tiny_modules.save(tmp_path / "model", own.Pooling(64), own.Normalize(), encoder=plain)
    update(
        folder / "tokenizer_config.json", tokenizer_class="MyTok", auto_map={"AutoTokenizer": [None, "tok_my.MyTok"]}
    )
    (folder / "tok_my.py").write_text(TOKENIZER, encoding="utf-8")
    listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    listed[1]["type"] = "pool_my.MyPooling"
    (folder / "modules.json").write_text(json.dumps(listed), encoding="utf-8")
    (folder / "pool_my.py").write_text(POOLING, encoding="utf-8")
    with pytest.raises(Unsupported, match=r"MyTok in tok_my\.py .*; MyPooling in pool_my\.py .*modules\.json") as found:
        locate.locate(str(folder))
    assert "--no-trust-remote-code" not in str(found.value)  # nothing stands in for a module
    (tmp_path / "float").mkdir()
    source, model = write_float_model(locate.locate(str(folder), trust_remote_code=True), tmp_path / "float")
    assert source.modules == ("Transformer", "pool_my.MyPooling", "Normalize") and model.max_abs_error < 1e-5
    saved = tmp_path / "float" / "config"
    assert (saved / "tokenizer.json").is_file() and not (saved / "modules.json").exists() and not [*saved.glob("*.py")]


def test_a_module_comes_in_with_the_tokenizer_of_a_directory_of_code(plain: Path, tmp_path: Path, ran: Path) -> None:
    import transformers

    folder = with_code(plain, tmp_path / "local")
    module = transformers.AutoModel.from_pretrained(plain, attn_implementation="eager")
    edgeq.export(module, ["x86-64-onnxruntime"], tmp_path / "out", tokenizer=folder, dry_run=True)
    assert not ran.exists()


def test_a_reference_in_another_form_and_heads_of_tasks(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    update(folder / "config.json", auto_map={"AutoModelForMaskedLM": "modeling_my.Head"})
    assert model_code.references(folder) == ()  # no embedding model asks for a head
    for given in ("modeling_my", "a.b.C", 3):
        update(folder / "config.json", auto_map={"AutoModel": given})
        with pytest.raises(ConfigError, match="FILE.CLASS"):
            model_code.references(folder)
