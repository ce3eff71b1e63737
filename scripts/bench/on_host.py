"""Runs on the host as root: starts the app by hand, beside the live slot, with the slot's own command.

on_host.py floor USER PID         seconds from starting Gunicorn to the 200 of /ready by each of its workers
on_host.py serve USER PID PORT    serve on a TCP port until killed
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START_SECONDS = 60
POLL_SECONDS = 0.005


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=5)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def command(pid: str, bind: str, folder: str) -> tuple[list[str], dict[str, str], str]:
    """Return the command, environment and working folder of a running Gunicorn, made to listen elsewhere."""
    process = Path("/proc") / pid
    words = process.joinpath("cmdline").read_bytes().decode().split("\0")[:-1]
    pairs = process.joinpath("environ").read_bytes().decode().split("\0")[:-1]
    variables = dict(pair.split("=", 1) for pair in pairs)
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"):
        variables.pop(name, None)
    if "PROMETHEUS_MULTIPROC_DIR" in variables:
        variables["PROMETHEUS_MULTIPROC_DIR"] = folder
    return [*words, "--bind", bind], variables, str(process.joinpath("cwd").readlink())


def ready(path: str) -> str | None:
    """Ask once; returns the worker that is ready."""
    connection = UnixConnection(path)
    try:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        return answer.headers["X-Forge-Worker"] if answer.status == 200 else None
    except OSError:
        return None
    finally:
        connection.close()


def floor(user: str, pid: str) -> float:
    """Start it, wait until as many workers are ready as the running one has, stop it; return the seconds to ready."""
    count = len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)  # noqa: PTH101, S103 - on a throwaway host
        path = f"{folder}/bench.sock"
        words, variables, cwd = command(pid, f"unix:{path}", folder)
        began = time.monotonic()
        process = subprocess.Popen(
            words, env=variables, cwd=cwd, user=user, group=user, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            workers: set[str | None] = set()
            while len(workers - {None}) < count:
                workers.add(ready(path))
                if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                    sys.exit(f"no answer from {' '.join(words)}; exit status {process.poll()}")
                time.sleep(POLL_SECONDS)
            return time.monotonic() - began
        finally:
            process.terminate()
            process.wait()


def serve(user: str, pid: str, port: str) -> None:
    """Become it."""
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o777)  # noqa: PTH101, S103 - on a throwaway host
    words, variables, cwd = command(pid, f"0.0.0.0:{port}", folder)
    process = subprocess.Popen(words, env=variables, cwd=cwd, user=user, group=user)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    sys.exit(process.wait())


if __name__ == "__main__":
    if sys.argv[1] == "floor":
        print(round(floor(*sys.argv[2:]), 3))
    else:
        serve(*sys.argv[2:])
