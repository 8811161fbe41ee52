"""Draw a parity card's plots as inline SVG; the page's style sets the colours."""

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
# The page has a CSS variable for each of these colours, with one value for light and one for dark.
_INK, _LINE = "#1b1f24", "#d0d4da"
_SERIES = ("#0b62c4", "#c2410c", "#0f7b4f", "#8b2fc9", "#a16207", "#be185d", "#0e7490", "#57534e")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_VARIABLES = {_INK: "--ink", _LINE: "--line", **{colour: f"--series-{n}" for n, colour in enumerate(_SERIES)}}

_WIDTH = 8.4  # inches; the page scales it
_LEAST_ERROR = 1e-7  # of a cosine: the resolution of float32 vectors; a logarithmic axis has no zero
_UNFUSED = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MOST_DTYPES = len(_SERIES)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "figure.facecolor": "none",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def require() -> None:
    """Check that matplotlib is installed, before anything is measured.

    Raises:
        ToolMissing: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ToolMissing(f"an HTML card needs matplotlib, which is not installed; {INSTALL}") from error


def distribution(card: Card) -> str | None:
    """Draw the distribution over texts of 1 - centred cosine with FP32, one line per artifact; None without any."""
    measured = [(position, row) for position, row in enumerate(card.artifacts()) if row.cosine_percentiles]
    if not measured:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for position, row in measured:
            errors = _errors(row.cosine_percentiles[::-1])
            axes.plot(errors, np.arange(101), color=_colour(position), label=row.name)
        _logarithmic(axes, "x")
        axes.set_xlabel("distance from FP32: 1 - centred cosine")
        axes.set_ylabel("% of texts no farther")
        _legend(axes, len(measured))

    return _svg("distribution", 4.0, draw)


def layers(card: Card) -> str | None:
    """Draw the residual stream's error from layer to layer, one line per QDQ model; None without any."""
    shown = [(position, item) for position, item in enumerate(card.layers) if item.errors and item.errors.stream]
    if not shown:
        return None
    after = {tensor.label: tensor.weight for _, item in shown for tensor in _stream(item)}
    names, labels = list(after), _short(list(after.values()))

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for position, item in shown:
            tensors = _stream(item)
            rows = [names.index(tensor.label) for tensor in tensors]
            style = {"color": _colour(position), "marker": _MARKERS[position % len(_MARKERS)], "label": item.scheme}
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
    """Draw the median latency at the longest length against 1 - centred cosine; None where nothing was timed."""
    timed = [
        (position, row, row.latency[-1].latency.p50_ms, row.measures)
        for position, row in enumerate(card.artifacts())
        if row.latency and row.measures is not None
    ]
    if not timed:
        return None
    reference = next((row for row in card.rows if row.kind == "float32" and row.latency), None)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for position, row, milliseconds, measures in timed:
            error = _errors([measures.centred_cosine_mean])
            marker = _MARKERS[position % len(_MARKERS)]
            axes.plot([milliseconds], error, linestyle="none", marker=marker, markersize=10, color=_colour(position),
                      label=row.name)  # fmt: skip
        if reference is not None:
            label = f"{reference.name} (distance 0)"
            axes.axvline(reference.latency[-1].latency.p50_ms, color=_INK, linestyle="--", linewidth=1.2, label=label)
        axes.margins(y=0.3)
        _logarithmic(axes, "y")
        axes.set_xlim(left=0.0)
        axes.set_xlabel(f"ms for one text of {timed[0][1].latency[-1].tokens} tokens, median")
        axes.set_ylabel("1 - centred cosine with FP32, mean")
        _legend(axes, len(timed) + 1)

    return _svg("latency", 4.0, draw)


def worst(card: Card) -> str | None:
    """Draw 1 - centred cosine with FP32 for each of the worst texts and each artifact; None without any."""
    if not card.worst_texts:
        return None
    positions = {row.name: position for position, row in enumerate(card.artifacts())}
    measured = [error.name for error in card.worst_texts[0].errors]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for column, name in enumerate(measured):
            errors = _errors([text.errors[column].cosine for text in card.worst_texts])
            position = positions[name]
            marker = _MARKERS[position % len(_MARKERS)]
            axes.plot(errors, range(len(errors)), linestyle="none", marker=marker, color=_colour(position), label=name)
        _logarithmic(axes, "x")
        axes.set_yticks(range(len(card.worst_texts)), [f"text {n + 1}" for n in range(len(card.worst_texts))])
        axes.invert_yaxis()
        axes.set_xlabel("distance from FP32: 1 - centred cosine")
        _legend(axes, len(measured))

    return _svg("worst", 4.4, draw)


def operators(card: Card) -> str | None:
    """Draw the number of operators by dtype for each file, as stacked bars; None where no file could be read."""
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
        for position, dtype in enumerate([*kept, *(["others"] if rest else [])]):
            wanted = rest if dtype == "others" and rest else [dtype]
            counts = np.array([sum(dtypes.get(name, 0) for name in wanted) for _, dtypes in counted])
            axes.barh(range(len(counted)), counts, left=starts, color=_colour(position), label=dtype, height=0.6)
            starts += counts
        axes.set_yticks(range(len(counted)), [name for name, _ in counted])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("operators")
        _legend(axes, len(kept) + 1)

    return _svg("operators", 1.9 + 0.42 * len(counted), draw)


def dtype_counts(row: Row) -> dict[str, int]:
    """Count a file's operators by the dtypes they compute on, the most frequent first.

    QuantizeLinear and DequantizeLinear do not count: a runtime fuses them with the operators between.
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
    """Give 1 - cosine, at least 1e-7."""
    errors: NDArray[np.float64] = np.maximum(1.0 - np.asarray(cosines, np.float64), _LEAST_ERROR)
    return errors


def _colour(position: int) -> str:
    return _SERIES[position % len(_SERIES)]


def _short(names: Sequence[str]) -> list[str]:
    """Drop the prefix that three quarters of the weights' names share, such as `model.0.model.`, to save width."""
    split = [name.split(".") for name in names]
    depths = Counter(tuple(words[:depth]) for words in split for depth in range(1, len(words)))
    # A name must not begin with a number: that means nothing without the word before it.
    starts = [
        start for start, times in depths.items() if 4 * times >= 3 * len(names) and not _is_cut_at_number(split, start)
    ]
    longest = max(starts, key=len, default=())
    return [".".join(words[_shared(words, longest) :]) for words in split]


def _is_cut_at_number(split: Sequence[list[str]], start: tuple[str, ...]) -> bool:
    """Tell whether a name without this prefix would begin with a number."""
    return any(words[_shared(words, start)].isdigit() for words in split)


def _shared(words: Sequence[str], start: Sequence[str]) -> int:
    """Count the leading words that a name shares with a prefix, at most all but one."""
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(words[:-1], start, strict=False))
    return sum(1 for _ in alike)


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with plain numbers as labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    is_wide = high > 30 * low
    axis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(axes: Axes, count: int, figure: Figure | None = None) -> None:
    """Put the legend above the plot."""
    handles, labels = axes.get_legend_handles_labels()
    owner = figure if figure is not None else axes.figure
    owner.legend(handles, labels, loc="outside upper left", ncols=2 if count == 4 else min(count, 3))


def _svg(name: str, height: float, draw: Callable[[Figure], None]) -> str:
    """Draw a figure; give its `<svg>` element, for use inside a page."""
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = NewFigure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        page = io.StringIO()
        figure.savefig(page, format="svg", metadata={"Date": None})
    return _embedded(page.getvalue(), name)


def _embedded(document: str, name: str) -> str:
    """Turn an SVG document into an element of a page with several drawings.

    Ids get the drawing's name as a prefix, namespaces and metadata are dropped, and colours become CSS variables.
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
