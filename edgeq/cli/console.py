"""Write results to stdout, and messages, logs and progress to stderr."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PLAIN_WIDTH = 200  # columns where no terminal says: wide enough that a path is not broken


@dataclass
class _Verbosity:
    """Hold how much is written to stderr."""

    verbose: int = 0
    is_quiet: bool = False


verbosity = _Verbosity()


def _be_verbose(count: int) -> int:
    """Raise the verbosity; the option may come before or after the verb."""
    verbosity.verbose = max(verbosity.verbose, count)
    _set_level()
    return count


def _be_quiet(is_quiet: bool) -> bool:
    """Silence progress and logs below errors."""
    verbosity.is_quiet = verbosity.is_quiet or is_quiet
    _set_level()
    return is_quiet


Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, callback=_be_verbose, help="Log more; -v -v also for defects.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_be_quiet, help="Write only results and errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]


def set_up() -> None:
    """Send logs to stderr at the level asked for."""
    verbosity.verbose, verbosity.is_quiet = 0, False
    handler = RichHandler(console=messages(), show_path=False, rich_tracebacks=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)


def _set_level() -> None:
    """Set the log levels of the verbosity: edgeq's own, and for other libraries ERROR below -v -v."""
    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    level = logging.ERROR if verbosity.is_quiet else levels[min(verbosity.verbose, 2)]
    logging.getLogger("edgeq").setLevel(level)
    logging.getLogger().setLevel(logging.ERROR if verbosity.verbose < 2 else logging.INFO)


def messages() -> Console:
    """Make a console on the present stderr, which tests replace."""
    return Console(stderr=True, soft_wrap=True)


def note(text: str) -> None:
    """Write a message that is not the result to stderr, unless --quiet is given."""
    if not verbosity.is_quiet:
        messages().print(visible(text), markup=False, highlight=False)


def complain(text: str) -> None:
    """Write an error message to stderr at any verbosity."""
    messages().print(f"edgeq: {visible(text)}", markup=False, highlight=False, style="red")


def put(text: str) -> None:
    """Write a line of the result to stdout."""
    sys.stdout.write(visible(text) + "\n")


def visible(text: str) -> str:
    """Escape control characters, which text of unknown origin may hold and a terminal would obey."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def put_json(document: Mapping[str, Any]) -> None:
    """Write the one JSON document of a verb to stdout; NaN and infinity, which JSON lacks, are refused."""
    put(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def put_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Write a table to stdout, as wide as the terminal, or 200 columns wide where there is none."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(visible(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, markup=False, highlight=False).print(table)


class _Stages:
    """Show the progress of each stage: a bar on a terminal, one line elsewhere."""

    def __init__(self, progress: Progress | None) -> None:
        """Draw on `progress`, or draw no bars where it is None."""
        self._progress = progress
        self._bars: dict[str, Any] = {}
        self._last: str | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a stage are done."""
        if self._progress is not None:
            if stage not in self._bars:
                self._bars[stage] = self._progress.add_task(stage, total=total)
            self._progress.update(self._bars[stage], completed=done, total=total)
        elif stage != self._last:
            note(stage)
        self._last = stage


@contextmanager
def stages() -> Iterator[_Stages]:
    """Yield the progress callback of a verb; remove the bars at the end."""
    console = messages()
    if verbosity.is_quiet or not console.is_terminal:
        yield _Stages(None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=False) as progress:
        yield _Stages(progress)


def megabytes(size_bytes: int) -> str:
    """Format a size in MB (10^6 bytes)."""
    return f"{size_bytes / 1e6:.2f} MB"
