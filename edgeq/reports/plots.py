"""Draw a card's plots as SVG that stands inside a page and takes its colours from the page's style."""

from __future__ import annotations

import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.analysis.layer_errors import TensorError
from edgeq.errors import ToolMissing
from edgeq.reports.contents import Card, Layers, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = 'pip install "edgeq[report]"'
# The page has a variable for each of these colours, with a value for light and one for dark.
INK, LINE = "#1b1f24", "#d0d4da"
SERIES = ("#0b62c4", "#c2410c", "#0f7b4f", "#8b2fc9", "#a16207", "#be185d", "#0e7490", "#57534e")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_VARIABLES = {INK: "--ink", LINE: "--line", **{colour: f"--series-{n}" for n, colour in enumerate(SERIES)}}

_WIDTH = 8.4  # inches; a page scales it, down to what is still readable
_LEAST_ERROR = 1e-7  # of a cosine: float32 vectors tell no less apart, and a logarithm has no zero
_UNFUSED = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MOST_DTYPES = len(SERIES)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "xtick.color": INK,
    "ytick.color": INK,
}


def require() -> None:
    """Say what is needed before anything is measured.

    Raises:
        ToolMissing: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ToolMissing(f"an HTML card needs matplotlib, which is not installed; {INSTALL}") from error


def distribution(card: Card) -> str | None:
    """Draw which share of the texts lies within which distance of FP32, for each artifact; None without any."""
    measured = [(place, row) for place, row in enumerate(card.artifacts()) if row.cosine_percentiles]
    if not measured:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, row in measured:
            errors = _errors(row.cosine_percentiles[::-1])
            axes.plot(errors, np.arange(101), color=_colour(place), label=row.name)
        _logarithmic(axes, "x")
        axes.set_xlabel("distance from FP32: 1 - cosine")
        axes.set_ylabel("% of texts no farther")
        _legend(axes, len(measured))

    return _svg("distribution", 4.0, draw)


def layers(card: Card) -> str | None:
    """Draw the error of the residual stream from layer to layer, for each QDQ model; None without any."""
    shown = [(place, item) for place, item in enumerate(card.layers) if item.errors and item.errors.stream]
    if not shown:
        return None
    after = {tensor.label: tensor.weight for _, item in shown for tensor in _stream(item)}
    names, labels = list(after), _short(list(after.values()))

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for place, item in shown:
            tensors = _stream(item)
            rows = [names.index(tensor.label) for tensor in tensors]
            style = {"color": _colour(place), "marker": MARKERS[place % len(MARKERS)], "label": item.scheme}
            left.plot([tensor.relative_error for tensor in tensors], rows, **style)
            right.plot(_errors([tensor.cosine_mean for tensor in tensors]), rows, **style)
        _logarithmic(right, "x")
        left.set_xlim(left=0.0)
        left.set_xlabel("relative error")
        right.set_xlabel("1 - cosine, mean over tokens")
        left.set_yticks(range(len(names)), labels)
        left.invert_yaxis()
        _legend(left, len(shown), figure)

    return _svg("layers", 1.6 + 0.28 * len(names), draw)


def latency(card: Card) -> str | None:
    """Draw the median time at the longest length against the distance from FP32; None where nothing was timed."""
    timed = [
        (place, row, row.latency[-1].latency.p50_ms, row.measures)
        for place, row in enumerate(card.artifacts())
        if row.latency and row.measures is not None
    ]
    if not timed:
        return None
    reference = next((row for row in card.rows if row.kind == "float32" and row.latency), None)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, row, milliseconds, measures in timed:
            error = _errors([measures.cosine_mean])
            marker = MARKERS[place % len(MARKERS)]
            axes.plot([milliseconds], error, linestyle="none", marker=marker, markersize=10, color=_colour(place),
                      label=row.name)  # fmt: skip
        if reference is not None:
            label = f"{reference.name} (distance 0)"
            axes.axvline(reference.latency[-1].latency.p50_ms, color=INK, linestyle="--", linewidth=1.2, label=label)
        axes.margins(y=0.3)
        _logarithmic(axes, "y")
        axes.set_xlim(left=0.0)
        axes.set_xlabel(f"ms for one text of {timed[0][1].latency[-1].tokens} tokens, median")
        axes.set_ylabel("1 - cosine with FP32, mean")
        _legend(axes, len(timed) + 1)

    return _svg("latency", 4.0, draw)


def worst(card: Card) -> str | None:
    """Draw how far each artifact's vectors of the worst texts are from FP32's; None without any."""
    if not card.worst_texts:
        return None
    places = {row.name: place for place, row in enumerate(card.artifacts())}
    measured = [error.name for error in card.worst_texts[0].errors]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for column, name in enumerate(measured):
            errors = _errors([text.errors[column].cosine for text in card.worst_texts])
            place = places[name]
            marker = MARKERS[place % len(MARKERS)]
            axes.plot(errors, range(len(errors)), linestyle="none", marker=marker, color=_colour(place), label=name)
        _logarithmic(axes, "x")
        axes.set_yticks(range(len(card.worst_texts)), [f"text {n + 1}" for n in range(len(card.worst_texts))])
        axes.invert_yaxis()
        axes.set_xlabel("distance from FP32: 1 - cosine")
        _legend(axes, len(measured))

    return _svg("worst", 4.4, draw)


def operators(card: Card) -> str | None:
    """Draw how many operators compute on which dtypes, for each file; None where none could be opened."""
    counted = [(row.name, dtypes) for row in card.rows if (dtypes := dtype_counts(row))]
    if not counted:
        return None
    totals: dict[str, int] = {}
    for _, dtypes in counted:
        for dtype, count in dtypes.items():
            totals[dtype] = totals.get(dtype, 0) + count
    ordered = sorted(totals, key=lambda dtype: -totals[dtype])
    kept, rest = ordered[: _MOST_DTYPES - 1], ordered[_MOST_DTYPES - 1 :]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        starts = np.zeros(len(counted))
        for place, dtype in enumerate([*kept, *(["others"] if rest else [])]):
            wanted = rest if dtype == "others" and rest else [dtype]
            counts = np.array([sum(dtypes.get(name, 0) for name in wanted) for _, dtypes in counted])
            axes.barh(range(len(counted)), counts, left=starts, color=_colour(place), label=dtype, height=0.6)
            starts += counts
        axes.set_yticks(range(len(counted)), [name for name, _ in counted])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("operators")
        _legend(axes, len(kept) + 1)

    return _svg("operators", 1.9 + 0.42 * len(counted), draw)


def dtype_counts(row: Row) -> dict[str, int]:
    """Add up a file's operators by the dtypes they compute on, the most frequent first.

    Q and DQ of ONNX are left out: a runtime fuses them into what stands between.
    """
    totals: dict[str, int] = {}
    for operator, dtypes in row.operators.items():
        if operator not in _UNFUSED:
            for dtype, count in dtypes.items():
                totals[dtype] = totals.get(dtype, 0) + count
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _stream(item: Layers) -> tuple[TensorError, ...]:
    return item.errors.stream if item.errors is not None else ()


def _errors(cosines: Sequence[float]) -> NDArray[np.float64]:
    """Give 1 - cosine, no less than float32 vectors can tell apart."""
    errors: NDArray[np.float64] = np.maximum(1.0 - np.asarray(cosines, np.float64), _LEAST_ERROR)
    return errors


def _colour(place: int) -> str:
    return SERIES[place % len(SERIES)]


def _short(names: Sequence[str]) -> list[str]:
    """Leave out the words that most names of weights begin with, such as `model.0.model.`: they take up width."""
    split = [name.split(".") for name in names]
    depths = Counter(tuple(words[:depth]) for words in split for depth in range(1, len(words)))
    # A number says nothing without the word before it.
    starts = [
        start for start, times in depths.items() if 4 * times >= 3 * len(names) and not _is_cut_at_number(split, start)
    ]
    longest = max(starts, key=len, default=())
    return [".".join(words[_shared(words, longest) :]) for words in split]


def _is_cut_at_number(split: Sequence[list[str]], start: tuple[str, ...]) -> bool:
    """Tell whether what is left of a name would begin with a number."""
    return any(words[_shared(words, start)].isdigit() for words in split)


def _shared(words: Sequence[str], start: Sequence[str]) -> int:
    """Count the words in front that a name shares with a start, but leave one."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(words[:-1], start, strict=False))
    return sum(1 for _ in alike)


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Let an axis be logarithmic, with labels that need no typesetting."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    is_wide = high > 30 * low
    axis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(axes: Axes, count: int, figure: Figure | None = None) -> None:
    """Put the legend above the plot, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    owner = figure if figure is not None else axes.figure
    owner.legend(handles, labels, loc="outside upper left", ncols=2 if count == 4 else min(count, 3))


def _svg(name: str, height: float, draw: Callable[[Figure], None]) -> str:
    """Draw a figure and give the element `<svg>` alone."""
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = NewFigure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        page = io.StringIO()
        figure.savefig(page, format="svg", metadata={"Date": None})
    return _embedded(page.getvalue(), name)


def _embedded(document: str, name: str) -> str:
    """Make one of several drawings of a page out of a whole SVG document.

    No id may stand twice in a page, no address in one that must not reach out, and colours come from its style.
    """
    drawing = document[document.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1\.1"', "", drawing)
    drawing = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawing, count=1)
    drawing = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawing, count=1)
    drawing = drawing.replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', drawing))
    drawing = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", drawing)
    drawing = re.sub(r'(href="|url\()#', rf"\1#{name}-", drawing)
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, f"var({variable}, {colour})")
    return drawing.strip()
