"""Target files, and what a machine must be."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeq import targets
from edgeq.backends.registry import find
from edgeq.errors import ConfigError
from edgeq.quantization import schemes
from edgeq.records import RunsOn
from edgeq.system import host

FILES = sorted((Path(__file__).resolve().parent.parent / "targets").glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_target_names_a_backend_and_a_scheme_that_exist(path: Path) -> None:
    target = targets.load_target(path.stem)
    find(target.backend, target.name)
    assert schemes.find(target.scheme, target.name).name == target.scheme
    assert target.source


def damaged(folder: Path, old: str, new: str) -> Path:
    (path,) = (file for file in FILES if file.stem == "x86-64-onnxruntime")
    text = path.read_text(encoding="utf-8")
    assert old in text
    (folder / path.name).write_text(text.replace(old, new, 1), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("scheme =", "shceme =", "did you mean scheme"),
        ('source = "', 'sauce = "', "source: missing"),
        ("spearman_min", "spaerman_min", "did you mean spearman_min"),
        ("spearman_min = 0.99", 'spearman_min = "high"', "found 'high'"),
        ("spearman_min = 0.99", "spearman_min = nan", "spearman_min"),
        ('name = "x86-64-onnxruntime"', 'name = "other"', "the file's own name"),
        ("[gate]", "[gate", "not valid TOML"),
        ('export_run_kinds = ["device"', 'export_run_kinds = ["divice"', "export_run_kinds"),
    ],
)
def test_a_typo_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="x86-64-onnxruntime.toml") as error:
        targets.load_target("x86-64-onnxruntime", damaged(tmp_path, old, new))
    assert message in str(error.value)


def test_an_unknown_target_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean x86-64-onnxruntime"):
        targets.load_target("x86-64-onnxruntme")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no target files"):
        targets.list_targets(tmp_path)


def test_an_unknown_scheme_or_backend_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match='scheme is "w4a8"; known schemes are w8a8-gemm'):
        schemes.find("w4a8", "x.toml")
    with pytest.raises(ConfigError, match="onnxruntime"):
        find("tvm", "x.toml")


def runs_on(**changes: object) -> RunsOn:
    fields: dict[str, object] = {"machine": host.machine(), "cpu_flags_all": (), "cpu_flags_any": ()}
    return RunsOn.model_validate(fields | changes)


def test_what_a_machine_lacks_is_listed() -> None:
    assert host.meets(runs_on()) == () and host.run_kind(runs_on()) == "device"
    assert "no_such_flag" in host.meets(runs_on(cpu_flags_all=("no_such_flag",)))[0]
    assert host.meets(runs_on(cpu_flags_any=("no_such_flag", "nor_this")))
    assert host.run_kind(runs_on(machine="riscv128")) == "host-kernels"
    assert host.run_kind(runs_on(machine="riscv128", elsewhere="emulator")) == "emulator"
    with pytest.raises(ValueError, match="elsewhere"):
        runs_on(elsewhere="device")  # what stands in for a device is none


def test_the_kernels_flags_count_only_where_they_agree_with_the_cpu() -> None:
    own = {"AVX2": True, "AVX512F": False}
    assert host.merge_flags(own, frozenset({"avx2", "avx_vnni"})) == {"avx2", "avx_vnni"}
    assert host.merge_flags(own, frozenset({"avx2", "avx512f", "avx512_vnni"})) == {"avx2"}  # another CPU's list
    assert host.merge_flags(own, frozenset()) == {"avx2"}
