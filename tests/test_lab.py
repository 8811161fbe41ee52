"""A lab of devices over a Ray cluster of two machines on this one: everything is done once, a lost machine or not."""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_device import ort_bundle

from edgeq.cli import run
from edgeq.devices.lab import results_page
from edgeq.devices.lab.cluster import packed, said, unpack
from edgeq.devices.lab.devices import LabDevice, read_devices
from edgeq.devices.lab.validate import LabResult, Plan, validate_all
from edgeq.devices.report import DeviceReport, reports_of
from edgeq.errors import ConfigError, DeviceUnavailable

needs_ray = pytest.mark.lab


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def write(path: Path, *devices: str) -> Path:
    path.write_text("\n".join(f"[[device]]\n{device}\n" for device in devices), encoding="utf-8")
    return path


# --- the file ---


def test_devices_are_read_with_defaults(tmp_path: Path) -> None:
    first, second = read_devices(
        write(
            tmp_path / "devices.toml",
            'name = "desk"\nwhere = "local"',
            'name = "pi"\nwhere = "ssh://pi@board:2222"\ntargets = ["arm64-*"]\ntime_limit_s = 60',
        )
    )
    assert (first.name, first.where, first.python, first.takes("anything")) == ("desk", "local", "python3", True)
    assert second.takes("arm64-onnxruntime") and not second.takes("x86-64-onnxruntime")
    assert second.transport().kind == "ssh" and second.time_limit_s == 60


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "nothing; .* entries are needed"),
        ("[[device]\n", "not valid TOML"),
        ("[[devices]]\nname = 'a'\n", "holds devices"),
        ("device = 3\n", "entries are needed"),
        ("[[device]]\nname = 'a'\n", "device 1: where: "),
        ("[[device]]\nname = 'a'\nwhere = 'local'\nport = 3\n", "device 1: port: "),
        ("[[device]]\nname = 'a'\nwhere = 'the moon'\n", "a: .*is no address"),
        ("[[device]]\nname = '///'\nwhere = 'local'\n", "cannot name a report"),
        ("[[device]]\nname = 'a b'\nwhere = 'local'\n[[device]]\nname = 'A-B'\nwhere = 'arm64'\n", "two devices"),
        ("[[device]]\nname = 'a'\nwhere = 'local'\ntime_limit_s = 0\n", "time_limit_s: "),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_devices(path)


def test_a_list_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_devices(tmp_path / "devices.toml")


def test_a_bundle_that_no_device_takes_is_refused_before_anything_runs(tmp_path: Path) -> None:
    bundle = ort_bundle(tmp_path / "out")
    with pytest.raises(ConfigError, match="no device takes"):
        validate_all([bundle], [LabDevice(name="a", where="local", targets=("other-*",))], Plan(), silent)


# --- the page ---


def test_the_page_escapes_what_a_device_says(tmp_path: Path) -> None:
    result = LabResult(
        bundle="out/x", target="x", device="<b>desk</b>", where="local", exit_code=9,
        message="<script>alert(1)</script>", attempts=3, report=None,
    )  # fmt: skip
    results_page.write([result], tmp_path / "lab.html")
    html = (tmp_path / "lab.html").read_text(encoding="utf-8")
    assert "<script" not in html and "<b>" not in html and "&lt;script&gt;" in html
    assert "0 of 1 passed" in html


# --- on a cluster ---


@pytest.fixture(scope="module")
def two_machines() -> Iterator[Any]:
    """Start a head without CPUs of its own, and one machine beside it."""
    pytest.importorskip("tenacity", reason="needs the extra `lab`")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        pytest.importorskip("ray", reason="needs the extra `lab`")
        from ray.cluster_utils import Cluster

        for left in (2, 1, 0):
            try:
                started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
                break
            except Exception as error:  # Ray gives a node 30 s, too few where every core has other tests to run
                if not left or "timed out during startup" not in str(error):
                    raise
        yield started
        started.shutdown()


@pytest.fixture(autouse=True)
def rays_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def bundles(folder: Path, count: int) -> list[Path]:
    return [ort_bundle(folder / f"out {row}") for row in range(count)]


def test_folders_arrive_whole_and_links_do_not_travel(tmp_path: Path) -> None:
    given = tmp_path / "given"
    (given / "below" / "empty").mkdir(parents=True)
    (given / "below" / "a.bin").write_bytes(bytes(range(256)))
    unpack(packed([given, given / "below"]), tmp_path / "there")
    found = sorted(path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*"))
    assert found == [
        "below", "below/a.bin", "below/empty", "given", "given/below", "given/below/a.bin", "given/below/empty",
    ]  # fmt: skip
    assert (tmp_path / "there" / "given" / "below" / "a.bin").read_bytes() == bytes(range(256))
    (given / "link").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="link"):
        packed([given])


def test_a_defect_in_a_worker_is_told_by_its_own_line() -> None:
    error = RuntimeError("ray::Worker.validate() (pid=1)\n  File x, line 1\nTypeError: no such argument")
    assert said(error) == "TypeError: no such argument"
    assert said(RuntimeError("The actor died.\n\tclass: Worker")) == "The actor died."
    assert said(RuntimeError()) == "RuntimeError"


@needs_ray
def test_every_pair_is_validated_once_and_its_report_kept(two_machines: Any, tmp_path: Path) -> None:
    given = bundles(tmp_path, 2)
    devices = [
        LabDevice(name="desk", where="local"),
        LabDevice(name="nobody", where="ssh://nobody@127.0.0.1:9"),
        LabDevice(name="other", where="local", targets=("other-*",)),  # takes none of them, and no CPU
    ]
    told: list[int] = []
    plan = Plan(runs=3, attempts=2, pause_s=0.1, ray=two_machines.address)
    results = validate_all(given, devices, plan, lambda stage, done, total: told.append(done))
    assert [(item.bundle, item.device) for item in results] == [
        (str(bundle), device.name) for bundle in given for device in devices[:2]
    ]
    assert told == [1, 2, 3, 4]
    for item in results:
        if item.device == "desk":
            assert item.exit_code == 0 and isinstance(item.report, DeviceReport) and item.attempts == 1
        else:
            assert (item.exit_code, item.attempts, item.report) == (DeviceUnavailable.exit_code, 2, None)
            assert "127.0.0.1" in item.message
    for bundle in given:
        assert [path.name for path in reports_of(bundle)] == [f"{bundle.name}.desk.device-report.json"]


@needs_ray
def test_a_machine_that_dies_half_way_costs_no_result_and_doubles_none(two_machines: Any, tmp_path: Path) -> None:
    given = bundles(tmp_path, 5)
    second = two_machines.add_node(num_cpus=1)
    devices = [LabDevice(name=name, where="local") for name in ("one", "two")]
    killed: list[float] = []

    def kill(stage: str, done: int, total: int) -> None:
        if not killed:
            killed.append(time.monotonic())
            two_machines.remove_node(second, allow_graceful=False)

    results = validate_all(given, devices, Plan(runs=3, ray=two_machines.address), kill)
    assert killed
    assert [(item.bundle, item.device) for item in results] == [
        (str(bundle), device.name) for bundle in given for device in devices
    ]
    assert [item.exit_code for item in results] == [0] * 10, [item.message for item in results]


@needs_ray
@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("127.0.0.1:1", DeviceUnavailable, "no cluster to work on"),
        ("nowhere.invalid:6379", DeviceUnavailable, "no cluster to work on"),
        ("6379", ConfigError, "HOST:PORT is needed"),
        ("host:0", ConfigError, "HOST:PORT is needed"),
    ],
)
def test_no_cluster_at_an_address_is_one_sentence(
    tmp_path: Path, address: str, kind: type[Exception], message: str
) -> None:
    pytest.importorskip("ray", reason="needs the extra `lab`")
    pytest.importorskip("tenacity", reason="needs the extra `lab`")
    bundle = ort_bundle(tmp_path / "out")
    with pytest.raises(kind, match=message):
        validate_all([bundle], [LabDevice(name="a", where="local")], Plan(ray=address), silent)


@needs_ray
def test_the_verb_prints_one_table_and_fails_by_its_worst(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], two_machines: Any
) -> None:
    bundle = ort_bundle(tmp_path / "out")
    devices = write(tmp_path / "devices.toml", 'name = "desk"\nwhere = "local"', 'name = "gone"\nwhere = "adb:NOBODY"')
    words = ["validate", str(bundle), "--lab", str(devices), "--runs", "3", "--ray", two_machines.address]
    code = run([*words, "--html", str(tmp_path / "lab.html"), "--json"])
    out, err = capsys.readouterr()
    desk, gone = json.loads(out)["results"]
    assert desk["exit_code"] == 0 and gone["exit_code"] == code != 0
    assert "1 of 2 did not pass" in err and "on gone" in err
    assert re.search(r"1 of 2 passed", (tmp_path / "lab.html").read_text(encoding="utf-8"))


def test_options_that_do_not_belong_together_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "a", "b"]) == ConfigError.exit_code
    assert run(["validate", "a", "--ray", "x"]) == ConfigError.exit_code
    assert run(["validate", "a", "--lab", "x.toml", "--on", "local"]) == ConfigError.exit_code
    assert "drop --on" in capsys.readouterr().err


@needs_ray
@pytest.mark.export
def test_exporting_on_the_cluster_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_machines: Any
) -> None:
    pytest.importorskip("sentence_transformers", reason="needs the extra `export`")
    import tiny_source

    from edgeq.devices.lab.export import export_on_cluster
    from edgeq.pipeline import export
    from edgeq.pipeline.request import ExportRequest
    from edgeq.system.cache import Cache
    from edgeq.targets import load_target

    monkeypatch.setenv("EDGEQ_CACHE_DIR", str(tmp_path / "here"))
    model = tiny_source.sentence_transformer(tmp_path / "model")
    for name, count, seed in (("texts", 48, 1), ("validation", 40, 2)):
        (tmp_path / f"{name}.txt").write_text("\n".join(tiny_source.texts(count, seed)), encoding="utf-8")
    targets = tuple(load_target(name) for name in ("x86-64-onnxruntime", "x86-64-avx2-onnxruntime"))

    def request(out: str) -> ExportRequest:
        return ExportRequest(
            str(model), targets, tmp_path / out, Cache(), texts=tmp_path / "texts.txt",
            validation=tmp_path / "validation.txt", keep_failed=True,
        )  # fmt: skip

    alone = export.export(request("alone"), silent)
    together = export_on_cluster(request("together"), silent, two_machines.address)
    assert [item.target for item in together] == [item.target for item in alone]
    for first, second in zip(alone, together, strict=True):
        assert first.parity == second.parity and second.path == str(tmp_path / "together" / second.target)
        sums = [(Path(item.path) / "SHA256SUMS").read_bytes() for item in (first, second)]
        assert sums[0] == sums[1]
