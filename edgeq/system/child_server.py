"""Serve requests in a child process: `edgeq.system.worker` sends them, and describes the lines of JSON.

This file needs the standard library and numpy alone, because some children live in environments where edgeq is not
installed. There it is the program, `python -I child_server.py CHILD.py [ARGUMENT...]`, and calls `main(arguments)` of
the child's file, which may import this file as `edgeq.system.child_server` and nothing else of edgeq.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

import numpy as np

Announce = Callable[[str], None]
Actions = Mapping[str, Callable[..., dict[str, Any]]]  # value of "do" -> function of the request's other keys


def pack(array: Any) -> dict[str, Any]:
    """Turn a numpy array of any numeric dtype into a JSON object: dtype, shape and base64 of its bytes in C order."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def unpack(packed: Mapping[str, Any]) -> Any:
    """Turn the JSON object that `pack` made into a writable numpy array of the same bits.

    Raises:
        KeyError, TypeError, ValueError: it is no packed array, or its bytes do not fill its shape.
    """
    data = bytearray(base64.b64decode(packed["data"], validate=True))
    return np.frombuffer(data, np.dtype(packed["dtype"])).reshape(packed["shape"])


def serve(child: Callable[[Announce], Actions], requests: Iterable[bytes], replies: IO[str]) -> None:
    """Answer requests, one JSON object per line, until there are no more.

    An exception becomes an {"error": ...} that begins with the last announcement, and the child goes on.

    Args:
        child: takes the function that announces what starts next, and gives the actions.
        requests: lines of JSON.
        replies: where announcements and replies are written, one JSON object per line.
    """
    announced = ""

    def put(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    def announce(what: str) -> None:
        nonlocal announced
        announced = what
        put({"announce": what})

    actions = child(announce)
    for line in requests:
        announced = ""
        try:
            reply = _answer(actions, json.loads(line))
        except (Exception, SystemExit) as error:  # the one boundary: a toolchain may raise anything, or exit
            traceback.print_exc()
            what = f"{type(error).__name__}: {error}"
            reply = {"error": f"{announced}: {what}" if announced else what}
        put(reply)


def _answer(actions: Actions, request: dict[str, Any]) -> dict[str, Any]:
    """Call the action that a request names with the request's other keys."""
    do = request.pop("do", None)
    if do not in actions:
        raise ValueError(f"do is {do!r}; one of {', '.join(actions)} is needed")
    return actions[do](**request)


def serve_standard_streams(child: Callable[[Announce], Actions]) -> None:
    """Answer requests on standard input; stdout is kept for replies, and what libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        serve(child, sys.stdin.buffer, replies)


def _main() -> int:
    """Load the child's file, and call its `main`."""
    path, arguments = sys.argv[1], sys.argv[2:]
    # The name by which the child imports this file, whether or not edgeq is installed here.
    sys.modules["edgeq.system.child_server"] = sys.modules[__name__]
    spec = importlib.util.spec_from_file_location("child", path)
    if spec is None or spec.loader is None:
        sys.stderr.write(f"{path}: no Python file\n")
        return 2
    module = importlib.util.module_from_spec(spec)
    sys.modules["child"] = module
    spec.loader.exec_module(module)
    return int(module.main(arguments))


if __name__ == "__main__":
    sys.exit(_main())
