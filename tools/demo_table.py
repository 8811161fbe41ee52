"""Print what tools/demo made: one line per bundle, from the JSON that edgeq itself wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from edgeq.bundle.turns import Ratio

COLUMNS = (
    "target",
    "MB",
    "centred cosine mean",
    "min",
    "Spearman",
    "top-10",
    "ms, 1 x 128",
    "speed-up",
    "ran on",
    "result",
)


def row(bundle: dict[str, Any], bench: dict[str, Any]) -> list[str]:
    """Turn one bundle and its measurement into a table row."""
    parity = bundle["parity"]
    quality = ["-"] * 4
    if parity is not None:
        quality = [
            f"{parity[key]:.4f}" for key in ("centred_cosine_mean", "centred_cosine_min", "spearman", "regret_mean")
        ]
    artifact = next(cell for cell in bench["cells"] if cell["model"] == "artifact")
    latency, speedup = artifact["latency"], artifact["speedup"]
    return [
        bundle["target"],
        f"{bundle['size_bytes'] / 1e6:.1f}",
        *quality,
        "-" if latency is None else f"{latency['p50_ms']:.2f}",
        "-" if speedup is None else Ratio.model_validate(speedup).shown(),
        bundle["ran_on"],
        bundle["status"],
    ]


def main(out: Path) -> None:
    """Read `export.json` and each target's `.bench.json` in `out`, and print the table and the bundles' paths."""
    bundles = json.loads((out / "export.json").read_text(encoding="utf-8"))["bundles"]
    table = Table(*COLUMNS, title="all-MiniLM-L6-v2, against FP32")
    for bundle in bundles:
        bench = json.loads((out / f"{bundle['target']}.bench.json").read_text(encoding="utf-8"))
        table.add_row(*row(bundle, bench))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print("speed-up: FP32's time over the bundle's, by turns: the median of the pairs [its 99 % interval]")
    for bundle in bundles:
        console.print(f"{bundle['target']}: {bundle['path']}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
