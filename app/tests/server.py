"""The application as it runs in production: Gunicorn, uvicorn workers, a unix socket."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from websockets.sync.client import ClientConnection, unix_connect

TESTS = Path(__file__).parent
T = TypeVar("T")


def eventually(look: Callable[[], T], seconds: float = 10) -> T:
    """Return the first true result of `look`."""
    deadline = time.monotonic() + seconds
    while not (result := look()):
        assert time.monotonic() < deadline, f"still {result!r} after {seconds} s"
        time.sleep(0.05)
    return result


class Server:
    """A Gunicorn master in a folder of its own, and clients of it."""

    def __init__(self, environ: dict[str, str], *options: str, workers: int = 1, boots: bool = True) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="inbox-")
        folder = Path(self._temporary.name)
        self.socket = folder / "app.sock"
        self._output = folder / "output"
        self._boots = boots
        (folder / "metrics").mkdir()
        self._environ = environ | {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(TESTS.parent / "src"),
            "PYTHONUNBUFFERED": "1",
            "PROMETHEUS_MULTIPROC_DIR": str(folder / "metrics"),
        }
        self._command = [
            *(sys.executable, "-m", "gunicorn", "inbox.main:app", "-c", str(TESTS / "gunicorn.conf.py")),
            *("-b", f"unix:{self.socket}", "-w", str(workers), *options),
        ]

    def __enter__(self) -> Self:
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._temporary.name,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.client = self.another_client()
        if self._boots:
            try:
                eventually(self._alive, 30)
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.client.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(25)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if kind is not None:
            sys.stdout.write(self.output())
        self._temporary.cleanup()

    def _alive(self) -> bool:
        assert self._process.poll() is None, self.output()
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(self.socket)):
                return False
        # It listens before a worker serves it: the request waits.
        return self.client.get("/health").status_code == 200

    def wait(self, seconds: float = 30) -> int:
        """Wait until the master has ended by itself; return its exit code."""
        return self._process.wait(seconds)

    def signal(self) -> None:
        """Tell it to stop, as systemd does."""
        self._process.send_signal(signal.SIGTERM)

    def output(self) -> str:
        """Return all that was written so far."""
        return self._output.read_text()

    def logged(self, **fields: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - values of any type
        """Return the application's log lines that have these fields; Gunicorn's own are not JSON here."""
        lines = [json.loads(line) for line in self.output().splitlines() if line.startswith("{")]
        return [line for line in lines if fields.items() <= line.items()]

    def another_client(self) -> httpx.Client:
        """Return a client with a connection of its own, which any worker may accept."""
        # A unix socket needs none of the CA certificates, which would take 0.1 s to load.
        transport = httpx.HTTPTransport(uds=str(self.socket), verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        return httpx.Client(transport=transport, base_url="http://inbox.test", timeout=30)

    def ready(self) -> int:
        """Return the status of /ready."""
        return self.client.get("/ready").status_code

    def post(self, key: str, payload: object = None, **headers: str) -> httpx.Response:
        """Store an event."""
        return self.client.post(
            "/v1/events", json={"type": "test", "payload": payload}, headers={"Idempotency-Key": key} | headers
        )

    @contextmanager
    def sse(self, cursor: str | None = None, last_event_id: str | None = None) -> Iterator["Sse"]:
        """Open a stream of server-sent events."""
        query = f"?cursor={quote(cursor)}" if cursor else ""
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        with self.client.stream("GET", f"/v1/events/stream{query}", headers=headers) as response:
            yield Sse(response)

    def websocket(self, cursor: str | None = None) -> ClientConnection:
        """Open a WebSocket."""
        query = f"?cursor={quote(cursor)}" if cursor else ""
        return unix_connect(str(self.socket), f"ws://inbox.test/v1/events/ws{query}")


class Sse:
    """The messages of a stream, keep-alive comments left out."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.iter_lines()

    def __iter__(self) -> Iterator[dict[str, str]]:
        message: dict[str, str] = {}
        for line in self._lines:
            if line.startswith(":"):
                continue
            if line:
                field, _, value = line.partition(":")
                message[field] = value.removeprefix(" ")
            elif message:
                yield message
                message = {}

    def next(self) -> dict[str, str]:
        """Wait for the next message."""
        return next(iter(self))

    def payload(self) -> Any:  # noqa: ANN401 - any JSON value
        """Wait for the next event and return its payload."""
        return json.loads(self.next()["data"])["payload"]
