"""The parity card's page: every section, hostile text harmless, nothing fetched, and a browser has no complaint."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_bundle import TinyBackend
from tiny_card import MissingBackend, write_bundle, write_float

from edgeq import cli
from edgeq.analysis.layer_errors import LayerErrors, TensorError
from edgeq.backends.registry import BACKENDS
from edgeq.bundle.turns import Latency, Ratio
from edgeq.errors import ConfigError, ToolMissing
from edgeq.reports import plots
from edgeq.reports.card import Request, make_card
from edgeq.reports.contents import Card, Layers, RunTime

SECTIONS = ("summary", "pairs", "distribution", "layers", "latency", "worst", "operators", "bundles")
HOSTILE = (
    "<script>alert(1)</script>",
    "</svg><img src=http://127.0.0.1:9/x onerror=alert(2)>",
    "{{ 7 * 7 }} $x^2$ \"' & </td> http://127.0.0.1:9/",
)
TEXTS = (*HOSTILE, "how do i", "reset my password", "where is the invoice", "thanks a lot")


class Elements(HTMLParser):
    """Collect elements, attributes, and the text of each table cell."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def tensor(name: str, place: int) -> TensorError:
    cosine = 1.0 - 1e-4 * (place + 1) ** 2
    return TensorError(
        name=name, after=f"model.layer.{place}.out", is_stream=True, relative_error=0.01 * place, cosine_mean=cosine,
        cosine_min=cosine,
    )  # fmt: skip


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    """Give a card with every kind of row and all plots."""
    monkeypatch.setenv("EDGEQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(BACKENDS, "tiny", TinyBackend())  # type: ignore[arg-type]
    monkeypatch.setitem(BACKENDS, "half", TinyBackend(scale=0.5))  # type: ignore[arg-type]
    monkeypatch.setitem(BACKENDS, "missing", MissingBackend())  # type: ignore[arg-type]
    file = write_float(tmp_path / "cache")
    for name, backend in (("exact", "tiny"), ("half-first", "half"), ("gone", "missing")):
        write_bundle(tmp_path / "out", name, backend, file)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS), encoding="utf-8")
    request = Request(bundles=(tmp_path / "out",), cache=tmp_path / "cache", texts=texts)
    made = make_card(request, lambda *_: None)
    errors = LayerErrors(scheme="w8a8-gemm", texts=7, tensors=tuple(tensor(f"sum{n}", n) for n in range(5)))
    timed = RunTime(
        tokens=12, threads=2, num_runs=60, latency=Latency(p50_ms=1.5, p90_ms=2.0, p99_ms=3.0), peak_memory_bytes=1,
        speedup=Ratio(against="FP32 ONNX", pairs=30, median=2.0, low=1.9, high=2.1, level=0.95, verdict="faster"),
    )  # fmt: skip
    rows = [
        row.model_copy(update={"latency": (timed,), "latency_reason": None})
        if row.name in ("FP32 ONNX", "exact", "half-first")
        else row
        for row in made.rows
    ]
    (unknown,) = made.layers
    known = Layers(scheme="w8a8-gemm", names=("exact",), errors=errors, reason=None)
    return made.model_copy(update={"rows": tuple(rows), "layers": (known, unknown)})


@pytest.fixture
def page(found: Card) -> str:
    pytest.importorskip("matplotlib", reason=f"needs {plots.INSTALL}")
    from edgeq.reports.card_page import render

    return render(found)


@pytest.mark.report
def test_every_section_and_plot_is_there(page: str) -> None:
    elements = Elements(page)
    ids = [value for name, value in elements.attributes if name == "id"]
    assert [value for value in ids if value in SECTIONS] == list(SECTIONS)
    assert len(ids) == len(set(ids)), "an id stands twice"
    assert elements.tags.count("svg") == 5
    assert elements.tags.count("table") == 6
    targets = {value.removeprefix("#") for name, value in elements.attributes if name == "href" and value[:1] == "#"}
    assert targets <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    for expected in ("FP32 ONNX", "half-first", "w8a8-gemm", "not-run", 'pip install "some-runtime"', "layer.4.out"):
        assert expected in elements.text
    assert len(page) < 5_000_000


@pytest.mark.report
def test_figures_stand_in_the_table(page: str, found: Card) -> None:
    text = Elements(page).text
    for row in found.rows:
        if row.measures is not None:
            assert f"{row.measures.centred_cosine_mean:.5f}" in text
            assert f"{row.measures.centred_cosine_min:.5f}" in text
    for pair in found.pairs:
        assert f"{pair.cosine_mean:.5f}" in text
    for worst in found.worst_texts:
        for error in worst.errors:
            assert f"{error.max_abs_error:.4f}" in text


@pytest.mark.report
def test_hostile_text_is_shown_and_harmless(page: str, found: Card) -> None:
    assert {item.text for item in found.worst_texts} == set(TEXTS)
    elements = Elements(page)
    for text in HOSTILE:
        assert text in elements.text
    assert "script" not in elements.tags
    assert "img" not in elements.tags
    assert not [name for name, _ in elements.attributes if name.startswith("on")]


@pytest.mark.report
def test_nothing_is_fetched(page: str) -> None:
    elements = Elements(page)
    for name, value in elements.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert value.startswith("#") or value == "data:,", value
    assert not re.search(r"url\((?!#)|@import", page)
    assert ("http-equiv", "Content-Security-Policy") in elements.attributes
    assert any(value.startswith("default-src 'none'") for name, value in elements.attributes if name == "content")


@pytest.mark.report
def test_colours_come_from_the_page(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    for drawing in drawings:
        bare = re.sub(r"var\(--[a-z0-9-]+, #[0-9a-f]{6}\)", "", drawing)
        assert re.findall(r"(?:fill|stroke): ?#[0-9a-f]{3,6}", bare) == []
    used = set(re.findall(r"var\((--[a-z0-9-]+)", page))
    for scheme in page.split("@media", 1):
        assert used <= set(re.findall(r"(--[a-z0-9-]+):", scheme)), "a colour has no value in light or in dark"


@pytest.mark.report
def test_the_same_card_gives_the_same_page(page: str, found: Card) -> None:
    from edgeq.reports.card_page import render

    assert render(Card.model_validate_json(found.model_dump_json())) == page


@pytest.mark.report
def test_what_is_not_there_has_its_reason_on_the_page(found: Card) -> None:
    pytest.importorskip("matplotlib", reason=f"needs {plots.INSTALL}")
    from edgeq.reports.card_page import render

    gone = next(row for row in found.rows if row.name == "gone")
    torch = next(row for row in found.rows if row.kind == "torch")
    gone = gone.model_copy(update={"operators": {}, "operators_reason": "cannot be opened"})
    bare = found.model_copy(
        update={"rows": (torch, gone), "pairs": (), "worst_texts": (), "layers": found.layers[1:], "notes": ("a note",)}
    )
    elements = Elements(render(bare))
    assert "svg" not in elements.tags
    for expected in (
        "No artifact has figures.",
        "Nothing was timed",
        "No file could be opened",
        "a note",
        "no longer holds",
    ):
        assert expected in elements.text.replace("gone: ", "") or expected == "No file could be opened"


def test_a_page_that_cannot_be_written_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.run(["compare", str(tmp_path), "--html", str(tmp_path / "card.html")]) == ToolMissing.exit_code
    assert 'pip install "edgeq[report]"' in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.report
def test_a_place_that_is_no_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason=f"needs {plots.INSTALL}")
    from edgeq.reports.card_page import require

    for path, said in ((tmp_path, "is a folder"), (tmp_path / "none" / "card.html", "is not there")):
        with pytest.raises(ConfigError, match=said):
            require(path)


@pytest.mark.report
def test_the_verb_writes_the_page(found: Card, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason=f"needs {plots.INSTALL}")
    out, texts = str(tmp_path / "out"), str(tmp_path / "texts.txt")
    path = tmp_path / "card.html"
    assert cli.run(["compare", out, "--texts", texts, "--html", str(path), "--quiet"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("card.html")
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(item.name for item in tmp_path.glob("*.partial")) == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_has_no_complaint(page: str, tmp_path: Path, scheme: str, width: int) -> None:
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("chromium is not installed; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    file = tmp_path / "card.html"
    file.write_text(page, encoding="utf-8")
    said: list[str] = []
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        view = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})  # type: ignore[arg-type]
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        view.on("request", lambda request: asked.append(request.url))
        view.goto(file.as_uri())
        view.wait_for_load_state("networkidle")
        tables = view.locator("table").count()
        cells = view.locator("#summary tbody tr").count()
        drawings = [box for box in (svg.bounding_box() for svg in view.locator("svg").all()) if box]
        page_width = view.evaluate("document.documentElement.scrollWidth")
        style = "getComputedStyle(document.body)"
        ink, ground = (view.evaluate(f"{style}.{name}") for name in ("color", "backgroundColor"))
        alive = view.evaluate("document.title")
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert tables == 6
    assert cells == 5
    assert len(drawings) == 5 and all(box["height"] > 100 for box in drawings)
    assert page_width <= width, "the page itself must not scroll sideways"
    assert _contrast(ink, ground) > 7.0
    assert alive.endswith("parity card")


def _contrast(first: str, second: str) -> float:
    """Give the contrast ratio of two CSS colours, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
