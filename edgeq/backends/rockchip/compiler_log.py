"""Read from the compiler's log the processor (NPU, CPU) of each operator, and the dtype of each stored weight.

Source: rknn-toolkit2 2.5.0, the tables of operators and of weights that its compiler prints while it is verbose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_HEAD = re.compile(r"ID\s+OpType\s+DataType\s+Target\s")
_OPERATOR = re.compile(
    r"D RKNN: \[[^\]]*\] \d+\s+(?P<kind>\S+)\s+(?P<dtype>\S+)\s+(?P<processor>NPU|CPU|GPU)\s.*\s(?P<name>\S+)\s*$"
)
_WEIGHT = re.compile(r"D RKNN: \[[^\]]*\] \d+\s+\S+\s+(?P<name>\S+)\s+(?P<dtype>[A-Z]+\d*)\s+\(\S+\)\s+\| 0x")
_ERROR = re.compile(r"^E (?:RKNN: \[[^\]]*\] )?(?P<text>.+)$", re.MULTILINE)
_HARMLESS = "Unkown op target: 0"  # in the log of every build, also of correct ones
_ENDS = ("InputOperator", "OutputOperator")
_LOG_LINES = 6


@dataclass(frozen=True)
class Operator:
    """Hold a row of the compiler's table of operators; long names are cut there."""

    kind: str
    dtype: str
    processor: str
    name: str


def plain(log: str) -> str:
    """Remove terminal colours from a log."""
    return _COLOURS.sub("", log)


def operators(log: str) -> tuple[Operator, ...]:
    """Give every operator of the last table in the log, without the graph's inputs and outputs."""
    tables = _HEAD.split(plain(log))
    if len(tables) < 2:
        return ()
    found = []
    for line in tables[-1].splitlines()[2:]:
        match = _OPERATOR.search(line)
        if match is None:
            break
        if match["kind"] not in _ENDS:
            name = match["name"].removeprefix(f"{match['kind']}:")
            found.append(Operator(match["kind"], match["dtype"], match["processor"], name))
    return tuple(found)


def weights(log: str) -> dict[str, set[str]]:
    """Give weight -> dtypes of its stored parts."""
    found: dict[str, set[str]] = {}
    for match in _WEIGHT.finditer(plain(log)):
        found.setdefault(re.sub(r"_branch\d+$", "", match["name"]), set()).add(match["dtype"])
    return found


def complaints(log: str) -> str:
    """Give the error lines of a log, or its last lines where it has none."""
    text = plain(log)
    errors = [match["text"] for match in _ERROR.finditer(text) if _HARMLESS not in match["text"]]
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return "\n".join(f"  {line[:300]}" for line in (errors or lines)[-_LOG_LINES:])
