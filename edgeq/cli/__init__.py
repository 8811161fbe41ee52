"""Give each stage a verb: parse, call, print. Every error becomes one message on stderr and its exit code."""

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
from edgeq.cli.inspect import inspect
from edgeq.cli.release import release
from edgeq.cli.targets import targets
from edgeq.cli.validate import validate
from edgeq.cli.verify import verify
from edgeq.errors import EdgeqError, StorageFailed
from edgeq.version import VERSION

_INTERRUPTED = 130
# What the operating system says when a place to write is full, read-only, forbidden, over quota, failing or gone.
_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}

app = typer.Typer(
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
    release,
    cache,
)
for _verb in _VERBS:
    # What a verb raises is for who reads the code; its exit codes are in docs/guides/troubleshooting.md.
    app.command(help=(introspection.getdoc(_verb) or "").split("\n\nRaises:")[0])(_verb)


def _show_version(is_wanted: bool) -> None:
    """Print the version and stop."""
    if is_wanted:
        console.put(f"edgeq {VERSION}")
        raise typer.Exit


@app.callback()
def edgeq(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Take an embedding model to a verified integer release for a named piece of hardware."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line and give its exit code; a defect of ours leaves as the exception it is."""
    console.set_up()
    try:
        # Not `app(...)`: that would put typer's own hook for unforeseen exceptions over ours.
        typer.main.get_command(app)(list(arguments), prog_name="edgeq")
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
        place = error.filename or "the disk"
        console.complain(f"{place}: {os.strerror(error.errno)}. Make room or allow writing there, and run again.")
        code = StorageFailed.exit_code
    else:
        code = 0
    if code == _INTERRUPTED:
        console.complain("interrupted; nothing half-written is left.")
    return code


def _report_defect(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say that this is our fault; the traceback is shown to who asked for it. The interpreter then exits with 1."""
    if console.verbosity.verbose >= 2:
        sys.__excepthook__(kind, error, trace)
    console.complain(
        f"a defect of edgeq ({kind.__name__}: {error}). Please report it, with what the same command prints with -v -v."
    )


def main() -> int:
    """Run the command line of this process."""
    sys.excepthook = _report_defect
    return run(sys.argv[1:])
