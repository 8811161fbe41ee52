"""Store a bundle on a device and run the device script there: the agent that `edgeq/devices/ssh.py` talks to.

Its text is sent to the device's Python and run there, so it is one file for Python 3.8 and newer that imports only the
standard library. It uses its standard input and output, so that no file name passes through a shell.

The host sends one line of JSON, then the bytes of the missing files, in the order of the request. The agent sends lines
of JSON: {"agent": 1, "wants": [[sha256, offset], ...]}, {"line": ...} for each line of the script's
stderr, and at the end {"exit": status, "report": text or null} or {"error": kind, "message": ...}.

Files are stored in `store/` by sha256, so that a second run sends only changed ones and an interrupted one continues. A
run's own folder is always removed at its end, and files that were not used for a month are removed.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

PIECE = 1 << 16
MONTH_S = 30 * 86400
REPORT_BYTES = 1000000


class Refused(Exception):
    """Stop with a kind of error and a message."""

    def __init__(self, kind, message):
        """Take both."""
        super().__init__(message)
        self.kind = kind


def put(message):
    """Send one line to the host."""
    sys.stdout.buffer.write(json.dumps(message).encode("ascii") + b"\n")
    sys.stdout.buffer.flush()


def sha256_of(path):
    """Hash a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(PIECE), b""):
            digest.update(piece)
    return digest.hexdigest()


def safe_path(folder, name):
    """Join a file's name of the host to a folder; it may not lead out of it."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or os.sep in part or ":" in part for part in parts):
        raise Refused("damaged", f"{name!r} leads out of the bundle")
    return folder.joinpath(*parts)


def locked(root):
    """Hold the store alone: two runs at once would write into one file."""
    file = (root / "lock").open("w")
    try:
        import fcntl
    except ImportError:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Refused("busy", "another validation runs on this device; wait for its end") from None
    return file


def clear(root):
    """Remove what killed runs left, and what nobody used for a month."""
    for path in (root / "runs").iterdir():
        shutil.rmtree(str(path), ignore_errors=True)
    for path in (root / "store").iterdir():
        if time.time() - path.stat().st_mtime > MONTH_S:
            path.unlink()


def wanted(store, blobs):
    """Say which files are missing, and how many bytes of each are here already."""
    wants = []
    for sha256, size in blobs:
        path, part = store / sha256, store / f"{sha256}.part"
        if path.is_file():
            if path.stat().st_size == size and sha256_of(path) == sha256:
                os.utime(str(path))
                continue
            path.unlink()
        held = part.stat().st_size if part.is_file() else 0
        if held > size:
            part.unlink()
            held = 0
        wants.append([sha256, held])
    return wants


def receive(store, wants, sizes):
    """Take the missing bytes from the host; what arrived stays if the connection breaks."""
    for sha256, held in wants:
        part, left = store / f"{sha256}.part", sizes[sha256] - held
        try:
            with part.open("ab") as file:
                while left:
                    piece = sys.stdin.buffer.read1(min(PIECE, left))
                    if not piece:
                        raise Refused("dropped", "the connection ended")
                    file.write(piece)
                    left -= len(piece)
        except OSError:
            part.unlink()  # a full disk gets its space back
            raise
        if sha256_of(part) != sha256:
            part.unlink()
            raise Refused("dropped", f"{sha256[:12]} arrived damaged")
        part.rename(store / sha256)


def lay_out(store, folder, files):
    """Give the bundle its shape, out of links to the store where the file system has them."""
    for name, sha256 in files:
        path = safe_path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(str(store / sha256), str(path))
        except OSError:
            shutil.copyfile(str(store / sha256), str(path))


def run(folder, options):
    """Run the script, pass on what it says, and give its exit status; the end of the connection ends it."""
    report = folder / "report.json"
    words = [folder / "validate.py", folder / "bundle", "--report", report]
    script = subprocess.Popen(
        [sys.executable, *map(str, words), *options],
        cwd=str(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )

    def end_with_the_connection():
        while sys.stdin.buffer.read1(PIECE):
            pass
        script.kill()

    threading.Thread(target=end_with_the_connection, daemon=True).start()
    try:
        for line in iter(lambda: script.stderr.readline(4096), b""):
            put({"line": line.decode("utf-8", "replace").rstrip()})
    except OSError:
        script.kill()  # nobody listens any more
    status, found = script.wait(), None
    if report.is_file():
        with report.open("rb") as file:
            found = file.read(REPORT_BYTES + 1).decode("utf-8", "replace")
    return status, found


def serve():
    """Take a bundle, run the script on it, send the report."""
    request = json.loads(sys.stdin.buffer.readline().decode("utf-8"))
    root = Path(request["root"]).expanduser() / "edgeq-device"  # all below is ours to remove
    store, folder = root / "store", root / "runs" / str(os.getpid())
    for path in (store, root / "runs"):
        path.mkdir(parents=True, exist_ok=True)
    lock = locked(root)
    try:
        clear(root)
        sizes = {sha256: size for sha256, size in request["blobs"]}
        wants = wanted(store, sorted(sizes.items()))
        put({"agent": 1, "wants": wants})
        receive(store, wants, sizes)
        folder.mkdir()
        lay_out(store, folder / "bundle", request["files"])
        shutil.copyfile(str(store / request["script"]), str(folder / "validate.py"))
        status, report = run(folder, request["options"])
    finally:  # first, because who reads the report may hang up
        shutil.rmtree(str(folder), ignore_errors=True)
        if not request["keep"]:
            shutil.rmtree(str(root), ignore_errors=True)
        lock.close()
    put({"exit": status, "report": report})


def main():
    """Serve, and turn what may go wrong into a message to the host."""
    try:
        serve()
    except Refused as error:
        put({"error": error.kind, "message": str(error)})
    except BrokenPipeError:
        pass  # nobody listens any more
    except OSError as error:
        put({"error": "storage", "message": f"{error.filename or 'writing'}: {error.strerror or error}"})


if __name__ == "__main__":
    main()
