"""The worker of every release: uvicorn's, which leaves without losing a request.

`gunicorn.conf.py`, beside which this file lies in each release, makes a subclass that names the release and the limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import fcntl
import gc
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, ClassVar

from uvicorn import Config, Server
from uvicorn_worker import UvicornWorker  # type: ignore[import-untyped]

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LINGER_S = 0.5
"""Nginx sends its request as soon as it is connected; this allows for a machine that is slow to say so."""


class Turns:
    """Who may be recycled: one worker of the host at a time, and none while its slot lacks another.

    Made in the Gunicorn master and inherited by every worker. All of it is locks, which the kernel takes back from a
    process that dies, however it dies.
    """

    def __init__(self, lock: Path, folder: str | None, workers: int) -> None:
        # A worker that serves locks the byte of a seat: record locks belong to a process and end with it.
        self._seats = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        # The host's lock is held by an open file, which the master has as well. So the turn of a worker outlasts it,
        # until its successor takes the seat and ends the turn; or until the master dies.
        try:
            self._turns = [os.open(lock, os.O_RDONLY | os.O_CLOEXEC) for _ in range(workers)]
        except FileNotFoundError:
            raise RuntimeError(
                f"expected the lock {lock}, which workers with max_requests share; found none; "
                "run systemd-tmpfiles --create"
            ) from None
        self._seat: int | None = None

    def sit(self) -> None:
        """Take a free seat, now that this worker serves. Without one yet, the next call tries again."""
        if self._seat is None:
            self._seat = next((seat for seat in range(len(self._turns)) if self._lock(seat)), None)
            if self._seat is not None:
                fcntl.flock(self._turns[self._seat], fcntl.LOCK_UN)

    def take(self) -> bool:
        """Take the turn, and keep it. False while another of this host has it or a sibling does not serve."""
        if self._seat is None:
            return False
        turn = self._turns[self._seat]
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        empty = [seat for seat in range(len(self._turns)) if seat != self._seat and self._lock(seat)]
        for seat in empty:
            fcntl.lockf(self._seats, fcntl.LOCK_UN, 1, seat)
        if empty:
            fcntl.flock(turn, fcntl.LOCK_UN)
        return not empty

    def _lock(self, seat: int) -> bool:
        with contextlib.suppress(BlockingIOError, PermissionError):
            fcntl.lockf(self._seats, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, seat)
            return True
        return False


class LingeringServer(Server):
    """A server that answers what its connections still bring before it closes them."""

    def __init__(self, config: Config, worker: ForgeWorker) -> None:
        super().__init__(config)
        self._worker = worker
        self._leaving = False
        self._waiting = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, with an application that asks for the end of each connection once this worker leaves."""
        self.config.loaded_app = self._closing(self.config.loaded_app)
        await super().startup(sockets)
        # What was made until now stays for good. The collector would look through all of it, tens of milliseconds in
        # which a worker answers nobody, in the middle of the first requests.
        gc.collect()
        gc.freeze()

    async def on_tick(self, counter: int) -> bool:
        """Say whether it is time to leave: ten times a second."""
        if await super().on_tick(counter):
            return True
        if (turns := self._worker.turns) is None:
            return False
        turns.sit()
        if self.server_state.total_requests < self._worker.max_requests:
            return False
        if not self._waiting:
            self._worker.log.info("Worker %s answered its %s requests", os.getpid(), self._worker.max_requests)
            self._waiting = True
        return turns.take()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, answer what was accepted, tell the application's streams, then shut down as uvicorn does.

        What waits in the queue of the listener is lost to nobody: the listener is systemd's and the siblings' as well.
        """
        for server in self.servers:
            server.close()
        # At once: uvloop closed the descriptor and would close it again later, when it may be an accepted connection's.
        for listener in sockets or []:
            listener.close()
        self._leaving = True
        # The ticks that Gunicorn takes for a heartbeat end here: all of its patience is for what follows.
        self._worker.notify()
        draining = self.lifespan.state.get("draining")
        if isinstance(draining, asyncio.Event):
            draining.set()
        await asyncio.sleep(LINGER_S)
        await super().shutdown(sockets)

    def _closing(self, app: App) -> App:
        async def closing(scope: Message, receive: Receive, send: Send) -> None:
            async def send_last(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
                await send(message)

            # Not the answer to a WebSocket's handshake, whose connection header is another.
            await app(scope, receive, send_last if self._leaving and scope["type"] == "http" else send)

        return closing


class ForgeWorker(UvicornWorker):  # type: ignore[misc]
    """A Gunicorn worker that lingers, and that takes its turn where `max_requests` is set."""

    # uvicorn would stop by itself at its limit, whoever else does so at the same moment.
    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {**UvicornWorker.CONFIG_KWARGS, "limit_max_requests": None}
    LOCK: ClassVar[Path] = Path("/run/lock/forge-recycle")
    turns: ClassVar[Turns | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In the master, before it forks its first worker.
        if self.cfg.max_requests and ForgeWorker.turns is None:
            ForgeWorker.turns = Turns(self.LOCK, self.cfg.worker_tmp_dir, self.cfg.workers)

    def init_signals(self) -> None:
        """Reset what Gunicorn's master catches, and have a worker that is killed with SIGABRT say where it stood.

        Gunicorn sends that to one whose event loop stands still, and so may a person. Files, lines and functions of the
        thread with the loop are told, and no value.
        """
        super().init_signals()
        faulthandler.enable(all_threads=False)

    async def _serve(self) -> None:
        # As in the parent, with this server in place of uvicorn's.
        self.config.app = self.wsgi
        # A gate can tell whether all workers are ready; Nginx keeps it from clients.
        self.config.headers = [*self.config.headers, ("X-Forge-Worker", str(os.getpid()))]
        server = LingeringServer(self.config, self)
        self._install_sigquit_handler()
        await server.serve(sockets=self.sockets)
        if not server.started:
            raise SystemExit(3)  # gunicorn.arbiter.Arbiter.WORKER_BOOT_ERROR
