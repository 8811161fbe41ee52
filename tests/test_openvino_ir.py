"""Reading an IR without OpenVINO: what is no IR is one message, and no entity is expanded."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeq.analysis.inspect.model_file import inspect
from edgeq.backends.openvino.ir import read_ir
from edgeq.errors import ConfigError, ToolMissing

PORT = '<port id="{}" precision="{}"><dim>2</dim><dim>3</dim></port>'
LAYER = '<layer id="{}" name="{}" type="{}" version="opset1">{}<output>{}</output></layer>'
CONSTANT = '<data element_type="i8" shape="2, 3" offset="0" size="6" />'
IR = (
    '<?xml version="1.0"?><net name="tiny" version="11"><layers>'
    + LAYER.format(0, "x", "Parameter", '<data shape="2,3" element_type="u8" />', PORT.format(0, "U8"))
    + LAYER.format(1, "w", "Const", CONSTANT, PORT.format(0, "I8"))
    + LAYER.format(2, "x32", "Convert", '<data destination_type="f32" />', PORT.format(1, "FP32"))
    + LAYER.format(3, "w32", "Convert", '<data destination_type="f32" />', PORT.format(1, "FP32"))
    + LAYER.format(4, "product", "MatMul", '<data transpose_b="true" />', PORT.format(2, "FP32"))
    + "</layers><edges>"
    + '<edge from-layer="0" from-port="0" to-layer="2" to-port="0" />'
    + '<edge from-layer="1" from-port="0" to-layer="3" to-port="0" />'
    + '<edge from-layer="2" from-port="1" to-layer="4" to-port="0" />'
    + '<edge from-layer="3" from-port="1" to-layer="4" to-port="1" />'
    + "</edges></net>"
)
BOMB = '<!DOCTYPE net [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'


@pytest.fixture
def xml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.xml"
    path.write_text(IR, encoding="utf-8")
    path.with_suffix(".bin").write_bytes(bytes(6))
    return path


def test_dtypes_are_seen_through_dequantisation(xml: Path) -> None:
    network = read_ir(xml)
    (product,) = network.of("MatMul")
    assert [network.dtype_read(source) for source in product.inputs] == ["uint8", "int8"]
    assert network.is_integer_product(product)
    found = inspect(xml)
    assert found.operators == {"Convert": {"int8": 1, "uint8": 1}, "MatMul": {"uint8 x int8": 1}}
    assert (found.tensors["int8"].count, found.tensors["int8"].size_bytes) == (1, 6)


def test_a_float_operand_makes_no_integer_product(xml: Path) -> None:
    xml.write_text(IR.replace('precision="U8"', 'precision="FP32"'), encoding="utf-8")
    network = read_ir(xml)
    assert not network.is_integer_product(next(network.of("MatMul")))


def test_entities_are_refused(xml: Path) -> None:
    xml.write_text(IR.replace('<?xml version="1.0"?>', f'<?xml version="1.0"?>{BOMB}'), encoding="utf-8")
    with pytest.raises(ConfigError, match="document type"):
        read_ir(xml)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no element found"),
        ("no xml", "not a readable OpenVINO IR"),
        ("<html></html>", "no <net>"),
        (IR[:400], "not a readable OpenVINO IR"),
        (IR.replace('from-layer="3"', 'from-layer="9"'), "'9' is missing"),
        (IR.replace('id="2" name="x32"', 'name="x32"'), "'id' is missing"),
        (IR.replace("<dim>2</dim>", "<dim>two</dim>"), "not a readable OpenVINO IR"),
    ],
)
def test_what_is_no_ir_is_one_message(xml: Path, content: str, message: str) -> None:
    xml.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_ir(xml)


def test_weights_that_are_too_short_or_missing_are_named(xml: Path) -> None:
    xml.with_suffix(".bin").write_bytes(bytes(5))
    with pytest.raises(ConfigError, match="has 5 bytes; w lies at 0"):
        inspect(xml)
    xml.with_suffix(".bin").unlink()
    with pytest.raises(ConfigError, match=r"tiny\.bin: is not there"):
        inspect(xml)


def test_without_openvino_its_backend_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    from edgeq.backends import openvino
    from edgeq.backends.doctor import examine

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(openvino, "version", missing)
    with pytest.raises(ToolMissing, match=r'pip install "edgeq\[openvino\]"'):
        openvino.tools()
    (found,) = (item for item in examine() if item.name == "openvino")
    assert found.missing == ("openvino",)
