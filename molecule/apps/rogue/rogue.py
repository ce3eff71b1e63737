"""An app that does to its neighbours what it is asked to, as somebody would who runs code in it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _rogue  # type: ignore[import-not-found]
import asyncpg

SPIN = "import sys, time\nend = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: pass"
LINE = "x" * 200
kept: list[bytearray] = []


def read(path: str) -> str:
    """Read a file, or list a folder."""
    found = Path(path)
    if found.is_dir():
        return " ".join(sorted(path.name for path in found.iterdir()))
    return found.read_bytes()[:200].decode(errors="replace")


def write(path: str) -> str:
    """Add a byte to a file."""
    with Path(path).open("ab") as file:
        file.write(b"x")
    return "written"


def connect(path: str) -> str:
    """Connect to a unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(path)
    return "connected"


def signal(pid: str) -> str:
    """Look whether a process may be told to end."""
    os.kill(int(pid), 0)
    return "allowed"


def remove(path: str) -> str:
    """Remove a file."""
    Path(path).unlink()
    return "removed"


def run(command: str) -> str:
    """Run a program."""
    done = subprocess.run(command.split(), capture_output=True, timeout=20, check=True)
    return done.stdout.decode(errors="replace")[:2000]


async def login(text: str) -> str:
    """Log in to PostgreSQL with the app's own password: at a host or a socket's folder, as a role, to a database."""
    place, role, database = text.split()
    connection = await asyncpg.connect(
        host=place, user=role, database=database, password=os.environ["FORGE_DATABASE_PASSWORD"], timeout=10
    )
    await connection.close()
    return "logged in"


async def query(text: str) -> str:
    """Run a query in the app's own database."""
    parts = urllib.parse.urlsplit(os.environ["FORGE_DATABASE_URL"])
    connection = await asyncpg.connect(
        host=urllib.parse.unquote(parts.netloc.rpartition("@")[2]),
        user=parts.username,
        database=parts.path.lstrip("/"),
        password=os.environ["FORGE_DATABASE_PASSWORD"],
        timeout=10,
    )
    try:
        return str(await connection.fetch(text))
    finally:
        await connection.close()


def fetch(text: str) -> str:
    """Ask Nginx on loopback for `domain/path`."""
    domain, _, path = text.partition("/")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", 443), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=domain) as connection,
    ):
        connection.sendall(f"GET /{path} HTTP/1.1\r\nHost: {domain}\r\nConnection: close\r\n\r\n".encode())
        answer = connection.recv(4096).decode(errors="replace")
    status = answer.split(" ")[1]
    if not status.startswith("2"):
        raise PermissionError(status)
    return answer[:200]


TRIES: dict[str, Callable[[str], Any]] = {
    each.__name__: each for each in (read, write, connect, signal, remove, run, login, query, fetch)
}


async def attempt(tries: list[list[str]]) -> dict[str, str]:
    """What came of each try that came to something."""
    worked = {}
    for name, argument in tries:
        with contextlib.suppress(OSError, subprocess.SubprocessError, asyncpg.PostgresError, ValueError):
            found = TRIES[name](argument)
            worked[f"{name} {argument}"] = await found if asyncio.iscoroutine(found) else found
    return worked


def spin(seconds: float) -> None:
    """Keep every core busy twice over."""
    for _ in range(2 * (os.cpu_count() or 1)):
        subprocess.Popen([sys.executable, "-c", SPIN, str(seconds)])


def leak(seconds: float) -> None:
    """Take memory until the kernel ends this, or the time is over."""

    def grow() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            kept.append(bytearray(b"x" * 2**22))

    threading.Thread(target=grow, daemon=True).start()


def flood(seconds: float) -> None:
    """Write lines as fast as they are taken."""

    def pour() -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            os.write(1, f"{LINE}\n".encode() * 100)

    threading.Thread(target=pour, daemon=True).start()


HARMS = {"spin": spin, "leak": leak, "flood": flood}


async def app(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """The ASGI callable."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    name = scope["path"].strip("/")
    answer: Any = {"version": version("rogue"), "from_c": _rogue.answer()}
    if name == "try":
        answer = await attempt(json.loads(body))
    elif name in HARMS:
        HARMS[name](float(body))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})
