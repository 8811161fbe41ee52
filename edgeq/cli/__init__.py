"""Run the command line: one verb for each task. An error becomes one message on stderr and an exit code."""

from __future__ import annotations

import errno
import inspect as introspection
import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Annotated

import typer

from edgeq.cli import console
from edgeq.cli.analyze import analyze
from edgeq.cli.bench import bench
from edgeq.cli.cache import cache
from edgeq.cli.check import check
from edgeq.cli.compare import compare
from edgeq.cli.doctor import doctor
from edgeq.cli.embed import embed
from edgeq.cli.evaluate import evaluate
from edgeq.cli.export import export
from edgeq.cli.index import index
from edgeq.cli.inspect import inspect
from edgeq.cli.recommend import recommend
from edgeq.cli.release import release
from edgeq.cli.search import search
from edgeq.cli.targets import targets
from edgeq.cli.validate import validate
from edgeq.cli.verify import verify
from edgeq.errors import EdgeqError, StorageFailed
from edgeq.version import VERSION

_INTERRUPTED = 130
# Errors of the operating system when a disk is full, over quota, read-only, forbidden or failing.
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}

_app = typer.Typer(
    name="edgeq",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_VERBS: tuple[Callable[..., None], ...] = (
    targets,
    doctor,
    check,
    export,
    inspect,
    verify,
    validate,
    evaluate,
    bench,
    compare,
    analyze,
    embed,
    index,
    search,
    recommend,
    release,
    cache,
)
for _verb in _VERBS:
    # The help leaves out the docstring's section of exceptions.
    _app.command(help=(introspection.getdoc(_verb) or "").split("\n\nRaises:")[0])(_verb)


def _show_version(is_wanted: bool) -> None:
    """Print the version and exit."""
    if is_wanted:
        console.put(f"edgeq {VERSION}")
        raise typer.Exit


@_app.callback()
def edgeq(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Take an embedding model to a verified integer release for a named piece of hardware."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; an unforeseen exception, a defect of edgeq, is raised."""
    console.set_up()
    try:
        # Not `app(...)`: that would replace our hook for unforeseen exceptions by typer's.
        typer.main.get_command(_app)(list(arguments), prog_name="edgeq")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except EdgeqError as error:
        console.complain(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except MemoryError:
        console.complain("out of memory: close other programs, or give fewer --samples, and run again.")
        code = StorageFailed.exit_code
    except OSError as error:
        if error.errno not in _STORAGE_ERRNOS:
            raise
        where = error.filename or "the disk"
        console.complain(f"{where}: {os.strerror(error.errno)}. Make room or allow writing there, and run again.")
        code = StorageFailed.exit_code
    else:
        code = 0
    if code == _INTERRUPTED:
        console.complain("interrupted; nothing half-written is left.")
    return code


def _report_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say that an exception is a defect of edgeq; show its traceback with -v -v. The interpreter then exits with 1."""
    if console.verbosity.verbose >= 2:
        sys.__excepthook__(kind, error, trace)
    console.complain(
        f"a defect of edgeq ({kind.__name__}: {error}). Please report it, with what the same command prints with -v -v."
    )


def main() -> int:
    """Run the command line of this process."""
    sys.excepthook = _report_defect
    return run(sys.argv[1:])
