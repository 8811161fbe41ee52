"""An `adb` for PATH that behaves like the real one for get-state, push, pull and shell: the phone is a folder here.

Like the real one it joins the words behind `shell` with blanks and lets a shell read them, gives that shell's exit
status and keeps its stdout and stderr apart (shell_v2), and writes its own complaints to stderr with status 1. Paths of
the phone below /data/local/tmp lie below the folder. Files beside it steer it: `offline`, `unauthorized`, `full`, and
`fail_push`, which holds how many pushes break.
"""

from __future__ import annotations

import sys
from pathlib import Path

PHONE_ROOT = "/data/local/tmp"

PROGRAM = r"""
import os, shutil, subprocess, sys
from pathlib import Path
folder = Path(__file__).resolve().parent
phone, words = str(folder / "phone"), sys.argv[1:]
ROOT = "/data/local/tmp"
def fail(text):
    sys.stderr.write("adb: " + text + "\n"); sys.exit(1)
with (folder / "log").open("a") as log:
    log.write(repr(words) + "\n")
if words[:1] != ["-s"] or words[1] != "R58M123":
    fail("device '%s' not found" % words[1])
verb, rest = words[2], words[3:]
if (folder / "offline").exists():
    fail("device offline")
if (folder / "unauthorized").exists():
    sys.stderr.write("error: device unauthorized.\n"); sys.exit(1)
def here(path):
    assert path.startswith(ROOT), path
    return phone + path[len(ROOT):]
if verb == "get-state":
    print("device")
elif verb == "push":
    local, remote = rest
    steer = folder / "fail_push"
    if steer.exists() and int(steer.read_text()) > 0:
        steer.write_text(str(int(steer.read_text()) - 1))
        Path(here(remote)).write_bytes(Path(local).read_bytes()[:100])
        fail("error: failed to copy: remote couldn't read: connection reset")
    if (folder / "full").exists() and os.path.getsize(local) > 1000:
        fail("error: failed to copy '%s': remote couldn't create file: No space left on device" % local)
    with (folder / "pushed").open("a") as file:
        file.write("%d\n" % os.path.getsize(local))
    try:
        shutil.copyfile(local, here(remote))
    except OSError as error:
        fail("error: failed to copy: %s" % error)
    print("1 file pushed.")
elif verb == "pull":
    remote, local = rest
    try:
        shutil.copyfile(here(remote), local)
    except OSError:
        fail("error: failed to stat remote object '%s': No such file or directory" % remote)
    print("1 file pulled.")
elif verb == "shell":
    # The phone's shell reads one line; its files lie in this folder.
    line = " ".join(rest).replace(ROOT, phone)
    env = {"PATH": str(folder / "tools") + ":" + os.environ["PATH"]}
    sys.exit(subprocess.run(["sh", "-c", line], env=env, stdin=subprocess.DEVNULL, cwd=phone).returncode)
else:
    fail("unknown command " + verb)
"""

# LiteRT's benchmark_model, as far as it is used: one signature, inputs from files, the output as bytes.
NATIVE = r"""#!{python}
import sys
sys.path[:0] = {path!r}
import numpy as np
from ai_edge_litert.interpreter import Interpreter
given = dict(word[2:].split("=", 1) for word in sys.argv[1:])
runner = Interpreter(model_path=given["graph"]).get_signature_runner(given["signature_to_run_for"])
shapes = [list(map(int, shape.split(","))) for shape in given["input_layer_shape"].split(":")]
files = dict(pair.split(":", 1) for pair in given["input_layer_value_files"].split(","))
arrays = {{
    name: np.fromfile(files[name], np.int32).reshape(shape)
    for name, shape in zip(given["input_layer"].split(","), shapes)
}}
(output,) = runner(**arrays).values()
open(given["output_filepath"], "wb").write(output.tobytes())
"""


def install(folder: Path) -> Path:
    """Write the program and its empty phone; give the folder that goes on PATH."""
    (folder / "phone").mkdir(parents=True)
    (folder / "tools").mkdir()
    (folder / "adb.py").write_text(PROGRAM, encoding="utf-8")
    (folder / "bin").mkdir()
    (folder / "bin" / "adb").write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/adb.py "$@"\n', encoding="utf-8")
    (folder / "bin" / "adb").chmod(0o755)
    return folder / "bin"


def native_binary(folder: Path) -> Path:
    """Write what stands in for benchmark_model."""
    path = folder / "benchmark_model"
    path.write_text(NATIVE.format(python=sys.executable, path=sys.path), encoding="utf-8")
    path.chmod(0o755)
    return path
