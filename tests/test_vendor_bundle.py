"""A bundle of a vendor's own quantising holds what its compiler was given, or is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_bundle import make_bundle, make_golden, make_lineage, make_report, make_target

from edgeq.bundle.checksums import write_sums
from edgeq.bundle.verify import verify
from edgeq.bundle.write import Lineage, write
from edgeq.errors import BundleCorrupt
from edgeq.quantization.schemes import SCHEMES
from edgeq.records import FileRef
from edgeq.system.files import file_ref

INT8, FLOAT16 = SCHEMES["rockchip-int8"], SCHEMES["rockchip-float16"]
FEEDS = FileRef(path="feeds.json", sha256="7" * 64, size_bytes=2)


def edited(path: Path, scheme: object, feeds: object) -> Path:
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["qdq_model"]["scheme"] = scheme
    manifest["qdq_model"]["feeds"] = feeds
    manifest["target"]["scheme"] = scheme["name"]  # type: ignore[index]
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    write_sums(path)
    return path


@pytest.mark.parametrize(
    ("scheme", "feeds", "message"),
    [
        (INT8, None, "feeds is missing, but rockchip-int8 asks for 64"),
        (FLOAT16, FEEDS, "feeds is there, but rockchip-float16 asks for none"),
        (INT8, FEEDS, r"feeds \(sha256 7{64}\) is none of the artifact's files"),
        (FLOAT16, None, r"qdq_model\.file \(sha256 5{64}\) is none of the artifact's files"),
        (SCHEMES["w8a8-gemm"], FEEDS, "feeds is there, but w8a8-gemm asks for none"),
    ],
)
def test_what_the_compiler_was_given_must_be_there(
    tmp_path: Path, scheme: object, feeds: FileRef | None, message: str
) -> None:
    path, _ = make_bundle(tmp_path / "out")
    given = None if feeds is None else feeds.model_dump(mode="json")
    with pytest.raises(BundleCorrupt, match=message):
        verify(edited(path, scheme.model_dump(mode="json"), given))  # type: ignore[attr-defined]


def test_feeds_go_by_their_bare_name(tmp_path: Path) -> None:
    make_bundle(tmp_path / "out")
    inputs = tmp_path / "out-inputs-0"
    target = make_target()
    lineage = make_lineage(inputs / "artifact", target)
    (tmp_path / "feeds.json").write_text("[[1, 2]]", encoding="utf-8")
    qdq = lineage.qdq_model.model_copy(update={"feeds": file_ref(tmp_path / "feeds.json")})
    changed = Lineage(**{**vars(lineage), "qdq_model": qdq})
    golden = make_golden(inputs / "artifact", inputs / "config")
    manifest = write(tmp_path / "other", changed, inputs / "artifact", inputs / "config", golden, make_report(target))
    assert manifest.qdq_model.feeds is not None and manifest.qdq_model.feeds.path == "feeds.json"
    assert str(tmp_path) not in (tmp_path / "other" / "manifest.json").read_text(encoding="utf-8")
