"""A real sshd on loopback with keys of its own, and an `ssh` on PATH that knows them and counts what it sends."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PROXY = """
import os, socket, sys, threading
host, port, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
limit_file = os.path.join(folder, "limit")
limit = int(open(limit_file).read()) if os.path.exists(limit_file) else None
if limit is not None:
    os.unlink(limit_file)  # one connection breaks, the next does not
line = socket.create_connection((host, port))
def back():
    while piece := line.recv(1 << 16):
        count(len(piece)); os.write(1, piece)
    os._exit(0)
def count(number):
    with open(os.path.join(folder, "bytes"), "a") as file:
        file.write(f"{number}\\n")
threading.Thread(target=back, daemon=True).start()
sent = 0
while piece := os.read(0, 1 << 14):
    sent += len(piece); count(len(piece))
    if limit is not None and sent > limit:
        os._exit(1)
    line.sendall(piece)
line.shutdown(socket.SHUT_WR)
threading.Event().wait(10)
"""


@dataclass
class Sshd:
    """Hold a running server; `where` is its address for edgeq."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def where(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}{self.folder}/home"

    @property
    def there(self) -> Path:
        return self.folder / "home" / "edgeq-device"

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    def configure(self, key: str = "user", known: str = "known") -> None:
        """Write the client's configuration: which key it shows, and whose host key it knows."""
        proxy = f"{sys.executable} {self.folder}/proxy.py 127.0.0.1 {self.port} {self.folder}"
        (self.folder / "config").write_text(
            f"Host *\n  IdentityFile {self.folder}/{key}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.folder}/{known}\n  GlobalKnownHostsFile none\n  ProxyCommand {proxy}\n",
            encoding="utf-8",
        )

    def bytes_sent(self) -> int:
        """Give the bytes on the wire, both ways, since this was asked last."""
        path = self.folder / "bytes"
        total = sum(map(int, path.read_text(encoding="utf-8").split())) if path.exists() else 0
        path.unlink(missing_ok=True)
        return total

    def break_after(self, number: int) -> None:
        """Break the next connection after so many bytes of the client's."""
        (self.folder / "limit").write_text(str(number), encoding="utf-8")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


def start(folder: Path) -> Sshd | str:
    """Start a server on a free port, or say why there is none."""
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if server is None or shutil.which("ssh") is None:
        return "sshd or ssh is not installed: apt-get install openssh-server openssh-client"
    folder.mkdir(parents=True)
    for name in ("host", "user", "stranger", "other_host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it shuts itself in
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    (folder / "authorized").write_text((folder / "user.pub").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
        f"PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n",
        encoding="utf-8",
    )
    for name, key in (("known", "host"), ("known_other", "other_host")):
        kind, text = (folder / f"{key}.pub").read_text(encoding="utf-8").split()[:2]
        (folder / name).write_text(f"[127.0.0.1]:{port} {kind} {text}\n", encoding="utf-8")
    (folder / "proxy.py").write_text(PROXY, encoding="utf-8")
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n', encoding="utf-8"
    )
    (folder / "bin" / "ssh").chmod(0o755)
    process = subprocess.Popen([server, "-D", "-f", folder / "sshd_config", "-E", folder / "log"])
    made = Sshd(folder, port, process)
    made.configure()
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return made
        time.sleep(0.1)
    made.stop()
    return f"sshd does not answer: {(folder / 'log').read_text(encoding='utf-8')[-300:]}"
