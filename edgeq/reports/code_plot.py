"""Draw what codes keep: recall@10 over the bytes of a code, and over queries a second."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from edgeq.errors import ConfigError, ToolMissing
from edgeq.system.files import write_bytes
from edgeq.vectors.measure import CodeFigures

_SUFFIXES = (".svg", ".png")
_INSTALL = 'pip install "edgeq[report]"'
_MARKERS = {"exact": "o", "hnsw": "^", "ivf": "s"}
_COLOURS = ("#0b62c4", "#c2410c", "#0f7b4f", "#8b2fc9")


def require(path: Path) -> None:
    """Check the plot's path and that matplotlib is installed, before anything is measured.

    Raises:
        ConfigError: the path ends in something else than .svg or .png.
        ToolMissing: matplotlib is not installed.
    """
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"--plot: {path} ends in {path.suffix!r}; {' or '.join(_SUFFIXES)} is needed. Rename it.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ToolMissing(f"--plot needs matplotlib, which is not installed; {_INSTALL}") from error


def write(figures: Sequence[CodeFigures], path: Path) -> None:
    """Draw one point for each model, codec and index, and write the plot whole or not at all.

    Raises:
        StorageFailed: the disk refuses.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "edgeq"}):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        models = list(dict.fromkeys(each.model for each in figures))
        for model, colour in zip(models, _COLOURS * len(models), strict=False):
            for kind, marker in _MARKERS.items():
                own = [each for each in figures if (each.model, each.index) == (model, kind)]
                if not own:
                    continue
                recalls = [each.recall_at_10 for each in own]
                sizes: list[float] = [each.code_bytes for each in own]
                speeds = [each.queries_per_second for each in own]
                for one, values in zip(axes, (sizes, speeds), strict=True):
                    one.scatter(values, recalls, c=colour, marker=marker, s=28, label=f"{model}, {kind}")
                    for each, value, recall in zip(own, values, recalls, strict=True):
                        one.annotate(each.codec, (value, recall), fontsize=7, xytext=(3, 3), textcoords="offset points")
        for one, label in zip(axes, ("bytes that a search reads of each document", "queries a second"), strict=True):
            one.set(xscale="log", xlabel=label)
            one.grid(visible=True, linewidth=0.4)
        axes[0].set_ylabel(f"recall@10 of FP32's exact search, {figures[0].documents:,} documents")
        axes[1].legend(fontsize=8)
        buffer = io.BytesIO()
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(buffer, format=path.suffix[1:], metadata=metadata)
    write_bytes(path, buffer.getvalue())
