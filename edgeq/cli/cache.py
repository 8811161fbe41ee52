"""Run the verb `cache`: show or purge the intermediate results of exports."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from edgeq.cli import console


class CacheAction(StrEnum):
    """Name what to do with the cache."""

    SHOW = "show"
    PURGE = "purge"


def cache(
    action: Annotated[CacheAction, typer.Argument(help="Show its size, or delete what it holds.")] = CacheAction.SHOW,
    as_json: console.AsJson = False,
    verbose: console.Verbose = 0,
    quiet: console.Quiet = False,
) -> None:
    """Show the cache of float models and calibrations, or purge it."""
    from edgeq.system.cache import Cache

    store = Cache()
    freed = store.purge() if action is CacheAction.PURGE else None
    entries = [{"kind": entry.kind, "key": entry.key, "size_bytes": entry.size_bytes} for entry in store.entries()]
    if as_json:
        sizes = {"size_bytes": store.size(), "freed_bytes": freed}
        console.put_json({"path": str(store.root), **sizes, "entries": entries})
        return
    if freed is not None:
        console.put(f"{store.root}: {console.megabytes(freed)} freed")
        return
    rows = [[entry.kind, entry.key[:12], console.megabytes(entry.size_bytes)] for entry in store.entries()]
    console.put_table(("kind", "key", "size"), rows)
    console.put(f"{store.root}: {console.megabytes(store.size())} in {len(rows)} entries")
