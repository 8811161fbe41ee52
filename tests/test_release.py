from __future__ import annotations

import io
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_release_signing import pem
from tiny_bundle import MEASURES, TinyBackend, make_bundle, make_report, make_target

from edgeq import cli
from edgeq.backends.registry import BACKENDS
from edgeq.bundle.turns import Latency
from edgeq.devices.report import Conditions, DeviceCell, DeviceMachine, DeviceReport, keep_report
from edgeq.errors import BundleCorrupt, ConfigError, ReleaseRefused
from edgeq.records import Exactness
from edgeq.release import archives, make, sign
from edgeq.release.archives import verify_archive
from edgeq.release.make import release
from edgeq.system.files import sha256_file

pytestmark = pytest.mark.release

BETTER = MEASURES.model_copy(update={"centred_cosine_mean": 0.9995, "centred_cosine_min": 0.9961})


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "tiny", TinyBackend())  # type: ignore[arg-type]
    monkeypatch.delenv(sign.KEY_VARIABLE, raising=False)
    monkeypatch.delenv(sign.PASSPHRASE_VARIABLE, raising=False)


def contents(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def two(out: Path) -> Path:
    """Write two bundles that are fit."""
    make_bundle(out)
    make_bundle(out, name="other", target=make_target(name="other"), seed=1)
    return out


def device_report(path: Path, **changes: object) -> DeviceReport:
    """Make a report from a board on which this bundle passed."""
    none = Conditions(temperatures_c={}, frequencies_mhz={})
    report = DeviceReport(
        format=1,
        target="tiny-target",
        manifest_sha256=sha256_file(path / "manifest.json"),
        transport="ssh",
        ran_on="device",
        status="passed",
        failures=(),
        measures=MEASURES.model_copy(update={"texts": 32}),
        host=Exactness(texts=32, centred_cosine_mean=1.0, centred_cosine_min=1.0, max_abs_error=0.0),
        machine=DeviceMachine(
            machine="aarch64", accelerator=None, cpu="Cortex-A76", cores=4, cpu_flags=(), system="Linux",
            memory_bytes=None, lacks=(),
        ),
        tools={"onnxruntime": "1.31.1"},
        threads=1,
        load_ms=10.0,
        peak_memory_bytes=100,
        cells=(
            DeviceCell(
                batch=1, sequence=16, runs=10, warmup_runs=1, latency=Latency(p50_ms=2.5, p90_ms=3.0, p99_ms=4.0)
            ),
        ),
        before=none,
        after=none,
    )  # fmt: skip
    return report.model_copy(update=changes)


def test_a_device_report_makes_a_bundle_fit_and_travels_with_it(tmp_path: Path) -> None:
    target = make_target()
    path, _ = make_bundle(tmp_path / "out", report=make_report(target, ran_on="host-kernels"))
    with pytest.raises(ReleaseRefused, match="was run on host-kernels only"):
        release([path], "1.0.0", tmp_path / "one")
    keep_report(path, "board", device_report(path))
    release([path], "1.0.0", tmp_path / "one")
    notes = (tmp_path / "one" / "RELEASE_NOTES.md").read_text(encoding="utf-8")
    assert "- device (Cortex-A76), on its 32 golden samples" in notes
    assert "| Cortex-A76, batch 1, 16 tokens: median, ms | 2.50 |" in notes
    assert (tmp_path / "one" / "tiny-1.0.0-tiny-target.board.device-report.json").is_file()
    slower = device_report(path).cells[0].model_copy(update={"latency": Latency(p50_ms=3, p90_ms=3, p99_ms=4)})
    keep_report(path, "board", device_report(path, cells=(slower,)))
    release([path], "1.1.0", tmp_path / "two", previous=tmp_path / "one")
    notes = (tmp_path / "two" / "RELEASE_NOTES.md").read_text(encoding="utf-8")
    assert "| Cortex-A76, batch 1, 16 tokens: median, ms | 2.50 | 3.00 | - |" in notes
    keep_report(path, "board", device_report(path, cells=()))
    release([path], "1.2.0", tmp_path / "three", previous=tmp_path / "two")
    notes = (tmp_path / "three" / "RELEASE_NOTES.md").read_text(encoding="utf-8")
    assert "| Cortex-A76, batch 1, 16 tokens: median, ms | 3.00 | - | - |" in notes


def test_device_reports_that_failed_lie_or_are_of_another_bundle_do_not_help(tmp_path: Path) -> None:
    target = make_target()
    path, _ = make_bundle(tmp_path / "out", report=make_report(target, ran_on="host-kernels"))
    poor = MEASURES.model_copy(update={"texts": 32, "invariance_min": 0.5})
    for changes, said in (
        ({"manifest_sha256": "0" * 64}, "was run on host-kernels only"),
        ({"ran_on": "emulator", "cells": (), "load_ms": None}, "was run on host-kernels, emulator only"),
        ({"measures": poor}, "says passed, but its measures say"),
        ({"measures": poor, "status": "failed", "failures": ("invariance",)}, "was run on host-kernels, device only"),
    ):
        keep_report(path, "board", device_report(path, **changes))
        with pytest.raises(ReleaseRefused, match=said):
            release([path], "1.0.0", tmp_path / "rel")


def test_a_bundle_that_missed_its_gate_is_not_saved_by_a_device(tmp_path: Path) -> None:
    failed = make_report(
        make_target(), status="failed", measures=MEASURES.model_copy(update={"centred_cosine_min": 0.5}),
        failures=("centred cosine min is 0.500000; at least 0.993 is needed.",),
    )  # fmt: skip
    path, _ = make_bundle(tmp_path / "out", report=failed)
    keep_report(path, "board", device_report(path))
    with pytest.raises(ReleaseRefused, match="missed the gate"):
        release([path], "1.0.0", tmp_path / "rel")


def test_a_release_holds_what_it_must(tmp_path: Path) -> None:
    made = release([two(tmp_path / "out")], "1.2.3", tmp_path / "rel")
    stems = ["tiny-1.2.3-other", "tiny-1.2.3-tiny-target"]
    names = {f"{stem}{end}" for stem in stems for end in (".tar.zst", ".cdx.json", ".intoto.json")}
    assert set(contents(tmp_path / "rel")) == names | {"RELEASE_NOTES.md", "SHA256SUMS"}
    assert [file.path for file in made.archives] == [f"{stem}.tar.zst" for stem in stems]
    assert made.is_new
    assert not made.is_signed
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=tmp_path / "rel", capture_output=True)
    assert done.returncode == 0


@pytest.mark.parametrize("form", ["tar.zst", "zip"])
def test_the_same_bundles_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    secret, _ = pem(tmp_path)
    release([two(tmp_path / "a" / "out")], "1.0.0", tmp_path / "a" / "rel", archive_format=form, key=secret)
    second = two(tmp_path / "b" / "out")
    for path in second.rglob("*"):
        os.utime(path, (1, 1))
        if path.is_file():
            path.chmod(0o600)
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    old = os.umask(0o077)
    try:
        release([second], "1.0.0", tmp_path / "b" / "rel", archive_format=form, key=secret)
    finally:
        os.umask(old)
    assert contents(tmp_path / "a" / "rel") == contents(tmp_path / "b" / "rel")


@pytest.mark.parametrize("form", ["tar.zst", "zip"])
def test_an_archive_holds_the_bundle_without_traces_of_this_machine(tmp_path: Path, form: str) -> None:
    path, _ = make_bundle(tmp_path / "out")
    release([path], "1.0.0", tmp_path / "rel", archive_format=form)
    archive = tmp_path / "rel" / f"tiny-1.0.0-tiny-target.{form}"
    if form == "zip":
        with zipfile.ZipFile(archive) as opened:
            held = {entry.filename: opened.read(entry) for entry in opened.infolist()}
            assert {entry.date_time for entry in opened.infolist()} == {(1980, 1, 1, 0, 0, 0)}
            assert {entry.external_attr >> 16 for entry in opened.infolist()} == {stat.S_IFREG | 0o644}
    else:
        zstandard = pytest.importorskip("zstandard")
        plain = zstandard.ZstdDecompressor().stream_reader(archive.read_bytes()).read()
        with tarfile.open(fileobj=io.BytesIO(plain)) as opened:
            entries = opened.getmembers()
            held = {entry.name: opened.extractfile(entry).read() for entry in entries}  # type: ignore[union-attr]
        assert {(e.mtime, e.mode, e.uid, e.gid, e.uname, e.gname) for e in entries} == {(0, 0o644, 0, 0, "", "")}
    top = "tiny-1.0.0-tiny-target"
    assert held == {f"{top}/{name}": data for name, data in contents(path).items()}
    assert list(held) == sorted(held)


@pytest.mark.parametrize("form", ["tar.zst", "zip"])
def test_an_archive_verifies_and_a_changed_one_does_not(tmp_path: Path, form: str) -> None:
    path, _ = make_bundle(tmp_path / "out")
    secret, public = pem(tmp_path)
    release([path], "1.0.0", tmp_path / "rel", archive_format=form, key=secret)
    archive = tmp_path / "rel" / f"tiny-1.0.0-tiny-target.{form}"
    found = verify_archive(archive, public)
    assert (found.path, found.files, found.golden_texts) == (str(archive), 12, 32)
    data = archive.read_bytes()
    for position in range(7, len(data), len(data) // 12):
        archive.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        with pytest.raises(BundleCorrupt, match="signature does not hold"):
            verify_archive(archive, public)
    # A .tar.zst may lose the four bytes of its check sum: every file in it has a better one.
    for length in (0, 3, 100, len(data) // 2, len(data) - 5):
        archive.write_bytes(data[:length])
        with pytest.raises(BundleCorrupt) as caught:
            verify_archive(archive, None)
        assert str(archive) in str(caught.value)


def test_a_bundle_that_is_damaged_inside_the_archive_is_named_by_the_archive(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    (path / "modules.json").write_text("[1]\n", encoding="utf-8")
    from edgeq.release import pack

    archive = tmp_path / "tiny.zip"
    pack.pack(path, archive, "zip")
    with pytest.raises(BundleCorrupt, match="modules.json") as caught:
        verify_archive(archive, None)
    assert f"{archive}:tiny" in str(caught.value)
    assert "edgeq-" not in str(caught.value)


def test_every_reason_is_given_for_every_bundle(tmp_path: Path) -> None:
    out = tmp_path / "out"
    failed = make_report(
        make_target(), status="failed", measures=MEASURES.model_copy(update={"centred_cosine_min": 0.5}),
        failures=("centred cosine min is 0.500000; at least 0.993 is needed.",),
    )  # fmt: skip
    make_bundle(out, name="failed", report=failed)
    elsewhere = make_target(name="elsewhere")
    make_bundle(out, name="elsewhere", target=elsewhere, report=make_report(elsewhere, ran_on="host-kernels"))
    both, _ = make_bundle(out, name="both", report=failed.model_copy(update={"ran_on": "host-kernels"}))
    (both / "modules.json").write_text("[1]\n", encoding="utf-8")
    fit, _ = make_bundle(out, name="fit")
    with pytest.raises(ReleaseRefused) as caught:
        release([out], "1.0.0", tmp_path / "rel")
    said = str(caught.value)
    assert "3 of 4 bundles" in said
    assert f"{out / 'failed'}: missed the gate of tiny-target: centred cosine min is 0.500000" in said
    assert f"{out / 'elsewhere'}: was run on host-kernels only" in said
    for reason in ("modules.json: its sha256", "missed the gate", "was run on host-kernels only"):
        assert [line for line in said.splitlines() if str(both) in line and reason in line], reason
    assert str(fit) not in said
    assert not (tmp_path / "rel").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_bundle_that_was_never_run_is_refused(tmp_path: Path) -> None:
    gate = make_target().gate.model_copy(update={"export_run_kinds": ("device", "not-run")})
    target = make_target(gate=gate)
    report = make_report(
        target, status="not-run", ran_on="not-run", measures=None, reason="no such device is in this machine"
    )
    path, _ = make_bundle(tmp_path / "out", target=target, report=report)
    with pytest.raises(ReleaseRefused, match=r"was never run \(no such device is in this machine\)"):
        release([path], "1.0.0", tmp_path / "rel")


def test_a_report_that_praises_itself_is_refused(tmp_path: Path) -> None:
    poor = make_report(make_target(), measures=MEASURES.model_copy(update={"centred_cosine_min": 0.5}))
    path, _ = make_bundle(tmp_path / "out", report=poor)
    with pytest.raises(ReleaseRefused, match="says passed, but its measures say") as caught:
        release([path], "1.0.0", tmp_path / "rel")
    assert "a passed validation on device is needed" in str(caught.value)


def test_records_that_cannot_be_read_are_a_reason_too(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    (path / "parity.json").write_text("{", encoding="utf-8")
    with pytest.raises(ReleaseRefused, match=r"parity\.json"):
        release([path], "1.0.0", tmp_path / "rel")


def test_notes_compare_with_the_previous_release(tmp_path: Path) -> None:
    release([two(tmp_path / "out")], "1.0.0", tmp_path / "one")
    target = make_target(gate=make_target().gate.model_copy(update={"centred_cosine_mean_min": 0.999}))
    better, _ = make_bundle(tmp_path / "next", target=target, report=make_report(target, measures=BETTER), seed=3)
    third, _ = make_bundle(tmp_path / "next", name="third", target=make_target(name="third"))
    release([better, third], "1.1.0", tmp_path / "two", previous=tmp_path / "one")
    notes = (tmp_path / "two" / "RELEASE_NOTES.md").read_text(encoding="utf-8")
    assert "| centred cosine with FP32, mean | 0.99910 | 0.99950 | +0.00040 |" in notes
    assert "| centred cosine with FP32, worst sample | 0.99510 | 0.99610 | +0.00100 |" in notes
    assert "- the target's gate" in notes
    assert "- the artifact's bytes" in notes
    assert "New in this release." in notes
    assert "- tiny for other" in notes.partition("## No longer released")[2]
    assert "Measured" not in notes  # on the same samples, place and machine
    first = (tmp_path / "one" / "RELEASE_NOTES.md").read_text(encoding="utf-8")
    assert "| centred cosine with FP32, mean | 0.99910 |" in first
    assert "change" not in first


def test_notes_say_when_figures_cannot_be_compared(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    release([path], "1.0.0", tmp_path / "one")
    report = make_report(make_target())
    others = report.texts.model_copy(update={"sha256": "8" * 64, "count": 10})
    changed = report.model_copy(update={"texts": others, "machine": "another one"})
    path, _ = make_bundle(tmp_path / "next", report=changed)
    release([path], "1.1.0", tmp_path / "two", previous=tmp_path / "one")
    notes = (tmp_path / "two" / "RELEASE_NOTES.md").read_text(encoding="utf-8")
    assert "Measured on other samples (512 before, 10 now), and on another machine" in notes
    assert "- not the artifact: it is the same, byte for byte" in notes


def test_a_damaged_previous_release_is_refused(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    release([path], "1.0.0", tmp_path / "one")
    notes = tmp_path / "one" / "RELEASE_NOTES.md"
    notes.write_text("better than ever", encoding="utf-8")
    with pytest.raises(BundleCorrupt, match=r"RELEASE_NOTES\.md"):
        release([path], "1.1.0", tmp_path / "two", previous=tmp_path / "one")
    with pytest.raises(ConfigError, match="no release"):
        release([path], "1.1.0", tmp_path / "two", previous=tmp_path / "out")


def test_the_bill_of_materials_names_model_data_tools_and_licences(tmp_path: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    path, manifest = make_bundle(tmp_path / "out")
    made = release([path], "1.0.0", tmp_path / "rel", model_licence="Apache-2.0")
    text = (tmp_path / "rel" / "tiny-1.0.0-tiny-target.cdx.json").read_text(encoding="utf-8")
    bill = json.loads(text)
    parts = {(part["type"], part["name"]): part for part in bill["components"]}
    subject = bill["metadata"]["component"]
    assert subject["hashes"] == [{"alg": "SHA-256", "content": made.archives[0].sha256}]
    assert subject["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert parts["machine-learning-model", "tiny"]["hashes"][0]["content"] == manifest.source.sha256
    assert parts["data", "calibration data"]["licenses"] == [{"license": {"id": "CC0-1.0"}}]
    assert parts["library", "onnx"]["version"] == "1"
    assert parts["library", "tiny"]["purl"] == "pkg:pypi/tiny@1"
    assert {"name": "edgeq:licence", "value": "not stated"} in parts["library", "onnx"]["properties"]
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_the_provenance_names_the_archive_and_its_chain(tmp_path: Path) -> None:
    path, manifest = make_bundle(tmp_path / "out")
    made = release([path], "1.0.0", tmp_path / "rel")
    said = json.loads((tmp_path / "rel" / "tiny-1.0.0-tiny-target.intoto.json").read_text(encoding="utf-8"))
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["predicateType"] == "https://slsa.dev/provenance/v1"
    assert said["subject"] == [{"name": made.archives[0].path, "digest": {"sha256": made.archives[0].sha256}}]
    build = said["predicate"]["buildDefinition"]
    assert build["externalParameters"]["command"] == list(manifest.command)
    assert set(build["internalParameters"]["packer"]) == {"zstd", "level"}
    inputs = {item["name"]: item["digest"]["sha256"] for item in build["resolvedDependencies"]}
    assert inputs["source"] == manifest.source.sha256
    assert inputs["calibration"] == manifest.calibration.file.sha256
    assert inputs["onnx/model.onnx"] == manifest.artifact.files[0].sha256


def test_the_key_is_in_no_file_and_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = make_bundle(tmp_path / "out")
    secret, _ = pem(tmp_path, b"open sesame")
    monkeypatch.setenv(sign.PASSPHRASE_VARIABLE, "open sesame")
    command = ["-v", "-v", "release", str(path), "--version", "1.0.0", "--to", str(tmp_path / "rel")]
    assert cli.run([*command, "--key", str(secret)]) == 0
    body = "".join(secret.read_text(encoding="utf-8").splitlines()[1:-1])
    told = "".join(capsys.readouterr())
    raw = __import__("cryptography.hazmat.primitives.serialization", fromlist=["x"]).load_pem_private_key(
        secret.read_bytes(), b"open sesame"
    )
    for name, data in {**contents(tmp_path / "rel"), "output": told.encode()}.items():
        for hidden in (body.encode(), b"open sesame", raw.private_bytes_raw(), raw.private_bytes_raw().hex().encode()):
            assert hidden not in data, name


def test_the_same_release_is_checked_and_kept_and_another_needs_overwrite(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    rel = tmp_path / "rel"
    release([path], "1.0.0", rel)
    before = contents(rel)
    assert not release([path], "1.0.0", rel).is_new
    assert contents(rel) == before
    with pytest.raises(ConfigError, match="--overwrite"):
        release([path], "1.0.1", rel)
    assert contents(rel) == before
    (rel / "RELEASE_NOTES.md").write_text("mine", encoding="utf-8")
    with pytest.raises(BundleCorrupt, match=r"RELEASE_NOTES\.md"):
        release([path], "1.0.0", rel)
    assert release([path], "1.0.1", rel, overwrite=True).is_new
    assert (rel / "tiny-1.0.1-tiny-target.tar.zst").is_file()
    assert not (rel / "tiny-1.0.0-tiny-target.tar.zst").exists()


def test_what_is_no_release_is_left_alone(tmp_path: Path) -> None:
    path, _ = make_bundle(tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    for place in (tmp_path / "mine", path):
        with pytest.raises(ConfigError, match="Give another --to"):
            release([path], "1.0.0", place, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").is_file()
    assert (path / "manifest.json").is_file()


@pytest.mark.parametrize("version", ["", "1", "1.0", "v1.0.0", "01.0.0", "1.0.0/..", "1.0.0 ", "1.0.0\n", "1.0.0-a_b"])
def test_a_version_that_is_none_is_refused(tmp_path: Path, version: str) -> None:
    with pytest.raises(ConfigError, match=r"X\.Y\.Z is needed"):
        release([tmp_path], version, tmp_path / "rel")


def test_two_bundles_of_one_name_are_refused(tmp_path: Path) -> None:
    first, _ = make_bundle(tmp_path / "a")
    second, _ = make_bundle(tmp_path / "b", seed=1)
    with pytest.raises(ConfigError, match="two bundles would have this name"):
        release([first, second], "1.0.0", tmp_path / "rel")
    assert len(release([first, first, tmp_path / "a"], "1.0.0", tmp_path / "rel").archives) == 1


def test_a_folder_without_bundles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no bundle"):
        release([tmp_path], "1.0.0", tmp_path / "rel")


def test_a_model_of_any_name_gets_a_name_for_its_archive(tmp_path: Path) -> None:
    path, manifest = make_bundle(tmp_path / "out")
    candidate, reasons = make.examine(path)
    assert candidate is not None
    assert not reasons
    for name, expected in (("org/model v1", "model-v1"), ("../..", "model"), ("a\nb", "a-b"), ("é" * 9, "model")):
        source = manifest.source.model_copy(update={"name": name})
        changed = make.Candidate(path, manifest.model_copy(update={"source": source}), candidate.report)
        assert make.archive_name(changed, "1.0.0", "zip") == f"{expected}-1.0.0-tiny-target.zip"


def test_the_verbs_release_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = make_bundle(tmp_path / "out")
    secret, public = pem(tmp_path)
    rel = tmp_path / "rel"
    command = ["release", str(tmp_path / "out"), "--version", "1.0.0", "--to", str(rel), "--format", "zip"]
    assert cli.run([*command, "--key", str(secret), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    archive = rel / made["archives"][0]["path"]
    assert made["is_signed"]
    assert cli.run(["verify", str(archive), "--public-key", str(public)]) == 0
    assert "signed, 12 files are whole" in capsys.readouterr().out
    assert cli.run(["verify", str(path), "--public-key", str(public)]) == 2
    assert "is no archive" in capsys.readouterr().err
    archive.write_bytes(archive.read_bytes()[:-1])
    assert cli.run(["verify", str(archive), "--public-key", str(public)]) == 7
    failed = make_report(
        make_target(), status="failed", measures=MEASURES.model_copy(update={"centred_cosine_min": 0.5}),
        failures=("centred cosine min is 0.500000; at least 0.993 is needed.",),
    )  # fmt: skip
    bad, _ = make_bundle(tmp_path / "bad", report=failed)
    assert cli.run(["release", str(bad), "--version", "1.0.0", "--to", str(tmp_path / "no")]) == 11


def test_a_zip_archive_needs_nothing_but_the_base_package(tmp_path: Path) -> None:
    # A reader of another team has edgeq, not the extra.
    path, _ = make_bundle(tmp_path / "out")
    release([path], "1.0.0", tmp_path / "rel", archive_format="zip")
    code = (
        "import sys\n"
        "for name in ('zstandard', 'cryptography', 'cyclonedx'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from edgeq.release.archives import read_archive\n"
        "print(read_archive(Path(sys.argv[1])).name)\n"
    )
    archive = tmp_path / "rel" / "tiny-1.0.0-tiny-target.zip"
    done = subprocess.run([sys.executable, "-c", code, str(archive)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert archives.read_archive(archive).name == ("tiny", "tiny-target")


def test_words_of_strangers_are_only_words_in_the_notes(tmp_path: Path) -> None:
    report = make_report(make_target(), machine="evil | `cpu` <script>\n# Heading [x](http://example.org)")
    path, _ = make_bundle(tmp_path / "out", report=report)
    release([path], "1.0.0", tmp_path / "rel")
    notes = (tmp_path / "rel" / "RELEASE_NOTES.md").read_text(encoding="utf-8")
    assert "- device (evil cpu script # Heading x (http://example.org)), on 512 samples" in re.sub(" +", " ", notes)
