"""Constant load from outside a host, which counts everything that a client of the event inbox could complain of.

Open loop: requests are due by a schedule, whatever became of those before, and latency counts from the due time, so a
pause of the server shows in every request that fell into it. The requests are spread over keep-alive TLS clients, a
quarter of them HTTP/2, which carry half of the requests; beside them run a slow upload, a slow download, a follower
by server-sent events and one by WebSocket. Nothing is retried but what the protocols say was never processed, and
that is counted apart.

`Load` is for asyncio, `running()` and `capacity()` for everybody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import math
import random
import secrets
import socket
import ssl
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import h11
from hpack import Decoder, Encoder
from hyperframe.exceptions import HyperframeError
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from websockets.asyncio.client import connect as websocket_connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

OK = "ok"
STATUS = "status"
"""An answer, but not the one that was due: not 2xx, or a 2xx other than the one expected."""
WRONG = "wrong"
"""The right status with another content than was stored."""
REFUSED = "refused"
UNREACHABLE = "unreachable"
RESET = "reset"
"""Closed or reset before a byte of the answer."""
TRUNCATED = "truncated"
TIMEOUT = "timeout"
ANSWER_LOST = "answer lost"
"""The connection closed as if the request had not been read, and yet the event was stored."""
PROTOCOL = "protocol"
TLS = "tls"

IDLE_CLOSED = "idle_closed"
"""Retried: a keep-alive HTTP/1.1 connection was closed in good order (close_notify) with no byte of an answer.
RFC 9112, section 9.3.1."""
GOAWAY = "goaway"
"""Retried: a stream above the last one that a GOAWAY names, or refused with REFUSED_STREAM. RFC 9113, section 8.7."""

SERVICE_RESTART = 1012
UPLOAD_BYTES, UPLOAD_SECONDS = 64_000, 4.0
DOWNLOAD_BYTES, DOWNLOAD_SECONDS = 400_000, 4.0
CONNECT_SECONDS = 10.0
"""Until a client begins anew to connect: of a host that boots, TCP asks less and less often whether it is there."""
SETTLE_SECONDS = 10.0
"""How long followers may take at the end to see what was acknowledged."""
JSON_HEADERS = (("accept", "application/json"), ("user-agent", "forge-load"))
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WIDE_OPEN = 2**31 - 1
STREAMS_A_CONNECTION = 100


class Record(NamedTuple):
    """What became of one request."""

    due: float
    """Seconds since the epoch."""
    latency: float
    """Seconds from then to the end of the answer, or to the failure."""
    kind: str
    """get, page, post, upload, download, sse or websocket."""
    protocol: str
    """1.1 or 2."""
    outcome: str
    status: int
    """0 without an answer."""
    retried: str
    """Why it was sent again, see IDLE_CLOSED and GOAWAY; empty as a rule."""


@dataclass
class Follower:
    """What one client of the stream saw."""

    protocol: str
    seen: list[int] = field(default_factory=list)
    """Ids of events, in the order of their arrival."""
    told: int = 0
    """How often it was told to come back, and did."""
    cut: int = 0
    """How often the stream ended any other way."""

    def missed(self, acknowledged: Mapping[int, int]) -> set[int]:
        """Ids that were acknowledged and did not come."""
        return set(acknowledged.values()).difference(self.seen)

    def doubled(self) -> set[int]:
        """Ids that came more than once."""
        return {event for event, times in Counter(self.seen).items() if times > 1}


@dataclass
class Result:
    """What was sent and what came of it."""

    run: str
    """Names this run: every Idempotency-Key begins with it."""
    rate: float
    began: float
    ended: float = 0.0
    records: list[Record] = field(default_factory=list)
    acknowledged: dict[int, int] = field(default_factory=dict)
    """Id of the stored event by the number in its payload."""
    followers: dict[str, Follower] = field(default_factory=dict)
    idle_closes: int = 0
    """Keep-alive connections that the server closed while nothing was under way on them."""

    def between(self, begin: float, end: float) -> list[Record]:
        """Return the records of requests that were due in a span of time (seconds since the epoch)."""
        return [record for record in self.records if begin <= record.due <= end]

    @property
    def failed(self) -> list[Record]:
        """Every request that a client would complain of."""
        return [record for record in self.records if record.outcome != OK]

    def retried(self, why: str) -> int:
        """How many requests were sent again for a reason."""
        return sum(record.retried == why for record in self.records)

    def counts(self) -> dict[str, int]:
        """Count the failures by what they were: `status 502 post/1.1` is apart from `reset get/2`."""
        return dict(
            Counter(
                f"{record.outcome}{f' {record.status}' if record.outcome == STATUS else ''} "
                f"{record.kind}/{record.protocol}"
                for record in self.failed
            )
        )


def percentile(records: list[Record], percent: float) -> float:
    """Latency (s) that so many percent of the paced requests do not exceed; 0 without a request."""
    latencies = sorted(record.latency for record in records if record.kind in ("get", "page", "post"))
    return latencies[max(0, math.ceil(len(latencies) * percent / 100) - 1)] if latencies else 0.0


class _Request:
    """One request on its way."""

    __slots__ = ("body", "client", "due", "expect", "kind", "number", "received", "retried", "status")

    def __init__(self, number: int, kind: str, due: float, expect: tuple[int, int] | None) -> None:
        self.number = number
        self.kind = kind
        self.due = due
        self.expect = expect
        self.client: _Client | None = None
        self.retried = ""
        self.restart()

    def restart(self) -> None:
        """Forget what came so far."""
        self.status = 0
        self.received = False
        self.body = b""


class _Connection(asyncio.Protocol):
    """What both protocols share."""

    def __init__(self, client: _Client) -> None:
        self.client = client
        self.load = client.load
        self.used = False
        self.closing = False
        self.orderly = False
        self.transport: asyncio.Transport = None  # type: ignore[assignment] # asyncio sets it before anything else

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.load.connections.add(self)

    def connection_lost(self, _exc: Exception | None) -> None:
        self.load.connections.discard(self)

    def eof_received(self) -> None:
        # The end of the TCP stream alone, as a killed server leaves it, is not TLS' close_notify.
        self.closing = True
        with contextlib.suppress(ssl.SSLError):
            self.orderly = not self.transport.get_extra_info("ssl_object").read(1)

    @property
    def usable(self) -> bool:
        return not self.closing and not self.transport.is_closing()

    def send(self, request: _Request) -> None:
        raise NotImplementedError

    def abandon(self, _request: _Request) -> None:
        """The request takes too long."""
        raise NotImplementedError


class _Http1(_Connection):
    """One request at a time."""

    def __init__(self, client: _Client) -> None:
        super().__init__(client)
        self.http = h11.Connection(h11.CLIENT)
        self.request: _Request | None = None

    def send(self, request: _Request) -> None:
        self.request = request
        method, target, headers, body = self.load.message(request)
        data = self.http.send(h11.Request(method=method, target=target, headers=[("host", self.load.domain), *headers]))
        if body:
            data = (data or b"") + (self.http.send(h11.Data(data=body)) or b"")
        self.transport.write((data or b"") + (self.http.send(h11.EndOfMessage()) or b""))

    def data_received(self, data: bytes) -> None:
        request = self.request
        if request is None:
            self.transport.abort()
            return
        request.received = True
        try:
            self.http.receive_data(data)
            while True:
                event = self.http.next_event()
                if isinstance(event, h11.Data):
                    request.body += event.data
                elif isinstance(event, h11.Response):
                    request.status = event.status_code
                elif isinstance(event, h11.EndOfMessage):
                    break
                else:
                    return
        except h11.RemoteProtocolError:
            self.request = None
            self.transport.abort()
            self.load.finish(request, PROTOCOL)
            return
        self.request = None
        self.used = True
        if self.http.our_state is h11.DONE and self.http.their_state is h11.DONE:
            self.http.start_next_cycle()
        else:
            self.closing = True
            self.used = False  # the answer said so: it is no idle connection that somebody closes
            self.transport.close()
        self.load.finish(request)

    def abandon(self, _request: _Request) -> None:
        self.request = None
        self.used = False
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        request, self.request = self.request, None
        if request is None:
            self.load.result.idle_closes += self.used and not self.load.ending
        elif request.received:
            self.load.finish(request, TRUNCATED)
        elif self.used and self.orderly:
            self.load.retry(request, IDLE_CLOSED)
        else:
            self.load.finish(request, RESET)


class _Http2(_Connection):
    """Many requests at a time.

    Frames are read here and not by the library h2, which refuses whatever comes after a GOAWAY, while RFC 9113 has the
    streams below its last-stream-id go on. Windows are opened so far that no connection of a test fills them.
    """

    def __init__(self, client: _Client) -> None:
        super().__init__(client)
        self.encoder, self.decoder = Encoder(), Decoder()
        self.streams: dict[int, _Request] = {}
        self.next_stream = 1
        self.buffer = b""
        self.block = b""
        self.block_ends_stream = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        settings = {SettingsFrame.ENABLE_PUSH: 0, SettingsFrame.INITIAL_WINDOW_SIZE: WIDE_OPEN}
        opening = (SettingsFrame(0, settings=settings), WindowUpdateFrame(0, window_increment=WIDE_OPEN - 65535))
        self.transport.write(PREFACE + b"".join(frame.serialize() for frame in opening))

    @property
    def usable(self) -> bool:
        return super().usable and len(self.streams) < STREAMS_A_CONNECTION

    def send(self, request: _Request) -> None:
        method, target, headers, body = self.load.message(request)
        fields = [
            (":method", method),
            (":scheme", "https"),
            (":authority", self.load.domain),
            (":path", target),
            *headers,
        ]
        stream, self.next_stream = self.next_stream, self.next_stream + 2
        self.streams[stream] = request
        head = self.encoder.encode(fields, huffman=False)
        data = _frame(HeadersFrame.type, 0x04 if body else 0x05, stream, head)
        self.transport.write(data + _frame(DataFrame.type, 0x01, stream, body) if body else data)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        try:
            while len(self.buffer) >= 9:
                frame, length = Frame.parse_frame_header(memoryview(self.buffer[:9]))
                if len(self.buffer) < 9 + length:
                    return
                frame.parse_body(memoryview(self.buffer[9 : 9 + length]))
                self.buffer = self.buffer[9 + length :]
                self.frame(frame)
        except (HyperframeError, ValueError, LookupError):
            streams, self.streams = self.streams, {}
            self.transport.abort()
            for request in streams.values():
                self.load.finish(request, PROTOCOL)

    def frame(self, frame: Frame) -> None:
        """Act upon one frame."""
        if isinstance(frame, DataFrame):
            if request := self.streams.get(frame.stream_id):
                request.body += frame.data
            if "END_STREAM" in frame.flags:
                self.ended(frame.stream_id)
        elif isinstance(frame, HeadersFrame | ContinuationFrame):
            self.block += frame.data
            self.block_ends_stream |= "END_STREAM" in frame.flags
            if "END_HEADERS" in frame.flags:
                self.headers(frame.stream_id)
        elif isinstance(frame, RstStreamFrame):
            if request := self.streams.pop(frame.stream_id, None):
                if frame.error_code == 7:
                    self.load.retry(request, GOAWAY)
                else:
                    self.load.finish(request, TRUNCATED if request.received else RESET)
        elif isinstance(frame, GoAwayFrame):
            # What was sent too late was not looked at; the rest is answered yet.
            self.closing = True
            for stream in [stream for stream in self.streams if stream > frame.last_stream_id]:
                self.load.retry(self.streams.pop(stream), GOAWAY)
            self.close_if_done()
        elif isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
            self.transport.write(SettingsFrame(0, flags=["ACK"]).serialize())
        elif isinstance(frame, PingFrame) and "ACK" not in frame.flags:
            self.transport.write(PingFrame(0, opaque_data=frame.opaque_data, flags=["ACK"]).serialize())

    def headers(self, stream: int) -> None:
        """A block of headers is complete: the head of an answer, or its trailers."""
        fields = list(self.decoder.decode(self.block, raw=True))
        ends, self.block, self.block_ends_stream = self.block_ends_stream, b"", False
        if (request := self.streams.get(stream)) and not request.received:
            request.received = True
            request.status = int(fields[0][1])
        if ends:
            self.ended(stream)

    def ended(self, stream: int) -> None:
        """An answer is complete."""
        if request := self.streams.pop(stream, None):
            self.load.finish(request)
        self.close_if_done()

    def close_if_done(self) -> None:
        """Close a connection that takes no more requests after its last answer."""
        if self.closing and not self.streams:
            self.transport.close()

    def abandon(self, _request: _Request) -> None:
        for stream in [stream for stream, found in self.streams.items() if found is _request]:
            del self.streams[stream]
            self.transport.write(RstStreamFrame(stream, error_code=8).serialize())

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        streams, self.streams = self.streams, {}
        for request in streams.values():
            self.load.finish(request, TRUNCATED if request.received else RESET)


def _frame(kind: int | None, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class _Client:
    """A client with one connection, opened anew when the last one was closed."""

    def __init__(self, load: Load, protocol: str) -> None:
        self.load = load
        self.protocol = protocol
        self.connection: _Connection | None = None
        self.waiting: list[_Request] = []
        self.opening: asyncio.Task[None] | None = None

    def start(self, request: _Request) -> None:
        """Send a request, now or as soon as there is a connection."""
        request.client = self
        if self.connection is not None and self.connection.usable:
            self.connection.send(request)
            return
        self.waiting.append(request)
        if self.opening is None:
            self.opening = asyncio.get_running_loop().create_task(self.open())

    async def open(self) -> None:
        """Connect, then send what waits; what can't be sent has failed."""
        failure = ""
        try:
            self.connection = await self.load.connect(self)
        except (OSError, ssl.SSLError, TimeoutError) as error:
            failure = reason(error)
        self.opening = None
        waiting, self.waiting = self.waiting, []
        for request in waiting:
            if failure:
                self.load.finish(request, failure)
            elif self.connection is not None and self.connection.usable:
                self.connection.send(request)
            else:
                self.load.finish(request, RESET)

    def abandon(self, request: _Request) -> None:
        """The request takes too long."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif self.connection is not None:
            self.connection.abandon(request)


def reason(error: Exception) -> str:
    """Name the outcome of a connection that could not be opened or that broke."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return TLS
    if isinstance(error, ConnectionRefusedError):
        return REFUSED
    if isinstance(error, TimeoutError):
        return TIMEOUT
    if isinstance(error, ConnectionError | ssl.SSLError | EOFError):
        return RESET
    return UNREACHABLE if getattr(error, "errno", None) in (errno.EHOSTUNREACH, errno.ENETUNREACH) else RESET


class Load:
    """Constant load on one site, as an asynchronous context.

    Args:
        address: where the host is; `domain` is what TLS and HTTP ask it for, and `cafile` the only CA that is trusted.
        rate: requests a second, or None for a closed loop in which each client waits for its answer.
        clients: keep-alive connections; a quarter speaks HTTP/2.
        timeout: seconds from the due time.
        extras: whether the slow clients and the followers run too.
    """

    def __init__(
        self,
        address: str,
        domain: str,
        cafile: str | Path,
        *,
        rate: float | None,
        port: int = 443,
        clients: int = 32,
        timeout: float = 30.0,
        extras: bool = True,
    ) -> None:
        self.address, self.port, self.domain = address, port, domain
        self.timeout = timeout
        self.ending = False
        self.connections: set[_Connection] = set()
        """Those that are open yet: also such as wait for the goodbye of a host that has gone meanwhile."""
        self._interval = 1 / rate if rate else 0.0
        self._extras = extras
        self._contexts = {}
        for protocol, offer in (("1.1", "http/1.1"), ("2", "h2")):
            context = ssl.create_default_context(cafile=cafile)
            context.set_alpn_protocols([offer])
            self._contexts[protocol] = context
        self._numbers = itertools.count()
        self._first_cursor = ""
        self._latest: tuple[int, int] | None = None
        self._size = clients
        self._free = deque(_Client(self, "1.1") for _ in range(clients - clients // 4))
        self._wide = deque(_Client(self, "2") for _ in range(clients // 4))
        self._clients = (*self._free, *self._wide)
        self._queue: deque[_Request] = deque()
        self._open: dict[_Request, None] = {}
        self._ticker: asyncio.Handle | None = None
        self._sweeper: asyncio.Handle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._next_due = 0.0
        self.result = Result(run=f"load-{secrets.token_hex(6)}", rate=rate or 0.0, began=time.time())

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._epoch = time.time() - self._loop.time()
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_callback(self._cancel)
            # Every connection is there before the first request is due.
            async with asyncio.TaskGroup() as group:
                for client in self._clients:
                    group.create_task(client.open())
            if missing := sum(client.connection is None for client in self._clients):
                raise ConnectionError(f"{missing} of {len(self._clients)} clients can't connect to {self.address}")
            await self._begin()
            undo.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _prepare(self) -> int:
        """Store what the requests will ask for; return the event that is downloaded slowly."""
        large = await self._once("POST", "/v1/events", self._event(self._number(), DOWNLOAD_BYTES))
        page = await self._once("GET", "/v1/events?limit=1")
        self._first_cursor = quote(page["cursor"], safe="")
        return int(large["id"])

    async def _begin(self) -> None:
        large = await self._prepare()
        if self._extras:
            ready = [asyncio.Event(), asyncio.Event()]
            self.result.followers = {"sse": Follower("sse"), "websocket": Follower("websocket")}
            jobs = (
                self._follow(self.result.followers["sse"], self._sse, ready[0]),
                self._follow(self.result.followers["websocket"], self._websocket, ready[1]),
            )
            self._tasks = [self._loop.create_task(job) for job in jobs]
            async with asyncio.timeout(self.timeout):
                for event in ready:
                    await event.wait()
            self._tasks.append(self._loop.create_task(self._again(self._upload)))
            self._tasks.append(self._loop.create_task(self._again(lambda: self._download(large))))
        self.result.began = time.time()
        self._sweep()
        self._next_due = self._loop.time()
        if self._interval:
            self._tick()
        else:
            for _ in range(self._size):
                self._issue(self._loop.time())

    async def stop(self) -> Result:
        """Send nothing more, wait for what is under way, and return what happened. Calling it again is harmless."""
        if self.result.ended:
            return self.result
        self.ending = True
        self.result.ended = time.time()
        deadline = self._loop.time() + self.timeout + 1
        while self._open and self._loop.time() < deadline:
            await asyncio.sleep(0.05)
        slow, followers = self._tasks[2:], self.result.followers.values()
        await asyncio.gather(*slow)
        deadline = self._loop.time() + SETTLE_SECONDS
        while any(follower.missed(self.result.acknowledged) for follower in followers):
            if self._loop.time() > deadline:
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.2)  # what comes twice comes now
        await self._cancel()
        return self.result

    async def _cancel(self) -> None:
        for timer in (self._ticker, self._sweeper):
            if timer is not None:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self.connections:
            connection.transport.abort()

    # The paced requests. One callback each, no task: this is the hot path.

    def _tick(self) -> None:
        now = self._loop.time()
        while self._next_due <= now:
            self._issue(self._next_due)
            self._next_due += self._interval
        self._ticker = self._loop.call_at(self._next_due, self._tick)

    def _number(self) -> int:
        return next(self._numbers)

    def _issue(self, due: float) -> None:
        if self.ending:
            return
        number = self._number()
        request = _Request(number, self._kind(number), due, self._latest)
        self._open[request] = None
        if number // 4 % 2:
            self._wide.rotate()
            self._wide[0].start(request)
        elif self._free:
            self._free.popleft().start(request)
        else:
            self._queue.append(request)

    def _kind(self, number: int) -> str:
        return "post" if number % 2 else ("get" if number % 4 and self._latest else "page")

    def _event(self, number: int, size: int = 0) -> tuple[tuple[tuple[str, str], ...], bytes]:
        body = b'{"type":"load","payload":{"run":"%s","n":%d%s}}' % (
            self.result.run.encode(),
            number,
            b',"fill":"%s"' % (b"x" * size) if size else b"",
        )
        return (
            *JSON_HEADERS,
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("idempotency-key", f"{self.result.run}-{number}"),
        ), body

    def message(self, request: _Request) -> tuple[str, str, tuple[tuple[str, str], ...], bytes]:
        """Method, target, headers and body of a request."""
        if request.kind == "post":
            return "POST", "/v1/events", *self._event(request.number)
        if request.kind == "get" and request.expect:
            return "GET", f"/v1/events/{request.expect[1]}", JSON_HEADERS, b""
        return "GET", f"/v1/events?limit=10&cursor={self._first_cursor}", JSON_HEADERS, b""

    def finish(self, request: _Request, outcome: str = OK) -> None:
        """Record what became of a request, and use its client again."""
        if self._open.pop(request, self) is self:
            return
        now = self._loop.time()
        if outcome == OK:
            outcome = self._judge(request)
        client = request.client
        self._record(
            request.due,
            now,
            request.kind,
            client.protocol if client else "1.1",
            outcome,
            request.status,
            request.retried,
        )
        if client and client.protocol == "1.1":
            if self._queue:
                client.start(self._queue.popleft())
            else:
                self._free.append(client)
        if not self._interval:
            self._issue(now)

    def _record(
        self, due: float, now: float, kind: str, protocol: str, outcome: str, status: int, retried: str = ""
    ) -> None:
        self.result.records.append(Record(due + self._epoch, now - due, kind, protocol, outcome, status, retried))

    def _judge(self, request: _Request) -> str:
        if request.kind == "page":
            if request.status != 200:
                return STATUS
            whole = request.body.startswith(b'{"events":[') and request.body.endswith(b"}")
            return OK if whole else WRONG
        if request.status not in (200, 201):
            return STATUS
        try:
            event = json.loads(request.body)
            number, identity = event["payload"]["n"], event["id"]
        except (ValueError, LookupError, TypeError):
            return WRONG
        if request.kind == "get":
            return OK if request.expect == (number, identity) and request.status == 200 else WRONG
        if number != request.number:
            return WRONG
        self.result.acknowledged[number] = identity
        self._latest = (number, identity)
        if request.status == 201:
            return OK
        return ANSWER_LOST if request.retried else STATUS

    def retry(self, request: _Request, why: str) -> None:
        """Send a request again that was surely not processed."""
        request.restart()
        request.retried = why
        if request.client and request in self._open:
            request.client.start(request)

    def _sweep(self) -> None:
        now = self._loop.time()
        for request in list(itertools.takewhile(lambda each: each.due + self.timeout < now, self._open)):
            if request.client:
                request.client.abandon(request)
            else:
                self._queue.remove(request)
            self.finish(request, TIMEOUT)
        self._sweeper = self._loop.call_later(0.2, self._sweep)

    async def connect(self, client: _Client) -> _Connection:
        """Open a connection for a client. Raises OSError, ssl.SSLError or TimeoutError."""
        factory: Callable[[], _Connection] = lambda: (_Http2 if client.protocol == "2" else _Http1)(client)  # noqa: E731
        async with asyncio.timeout(min(self.timeout, CONNECT_SECONDS)):
            _, connection = await asyncio.get_running_loop().create_connection(
                factory, self.address, self.port, ssl=self._contexts[client.protocol], server_hostname=self.domain
            )
        return connection

    # The slow clients and the followers: few, so they may be coroutines.

    @contextlib.asynccontextmanager
    async def _stream(
        self, receive_buffer: int = 0
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        raw = socket.socket(socket.AF_INET6 if ":" in self.address else socket.AF_INET)
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.setblocking(False)
        try:
            async with asyncio.timeout(self.timeout):
                await self._loop.sock_connect(raw, (self.address, self.port))
                reader, writer = await asyncio.open_connection(
                    sock=raw, ssl=self._contexts["1.1"], server_hostname=self.domain, limit=8192
                )
        except BaseException:
            raw.close()
            raise
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _head(
        self,
        http: h11.Connection,
        reader: asyncio.StreamReader,
    ) -> h11.Response:
        while True:
            event = http.next_event()
            if isinstance(event, h11.Response):
                return event
            data = await reader.read(8192) if event is h11.NEED_DATA else b""
            if not data:
                raise EOFError
            http.receive_data(data)

    async def _once(
        self,
        method: str,
        target: str,
        message: tuple[tuple[tuple[str, str], ...], bytes] = (JSON_HEADERS, b""),
        *,
        sending: float = 0.0,
        reading: float = 0.0,
    ) -> Any:
        """Send one request on a connection of its own, over so many seconds, and return what came.

        Raises OSError, ssl.SSLError, EOFError (before an answer), h11.RemoteProtocolError (within it), _Status.
        """
        headers, body = message
        http = h11.Connection(h11.CLIENT)
        async with self._stream(8192 if reading else 0) as (reader, writer):
            head = h11.Request(
                method=method, target=target, headers=[("host", self.domain), ("connection", "close"), *headers]
            )
            writer.write(http.send(head) or b"")
            step = max(1, len(body) // 40)
            for start in range(0, len(body), step):
                writer.write(http.send(h11.Data(data=body[start : start + step])) or b"")
                await writer.drain()
                if sending and not self.ending:
                    await asyncio.sleep(sending / 40)
            writer.write(http.send(h11.EndOfMessage()) or b"")
            async with asyncio.timeout(self.timeout):
                answer = await self._head(http, reader)
            content = b""
            while not isinstance(event := http.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Data):
                    content += event.data
                elif event is h11.NEED_DATA:
                    async with asyncio.timeout(self.timeout):
                        http.receive_data(await reader.read(4096))
                    if reading and not self.ending:
                        await asyncio.sleep(reading * 4096 / DOWNLOAD_BYTES)
            if answer.status_code not in (200, 201):
                raise _Status(answer.status_code)
            return json.loads(content)

    async def _again(self, work: Callable[[], Any]) -> None:
        while not self.ending:
            if not await work():
                await asyncio.sleep(0.2)

    async def _slow(self, kind: str, work: Callable[[], Any]) -> bool:
        due = self._loop.time()
        outcome, status = OK, 200
        try:
            await work()
        except _Status as answer:
            outcome, status = STATUS, answer.code
        except h11.RemoteProtocolError:
            outcome = TRUNCATED
        except (OSError, ssl.SSLError, EOFError, TimeoutError) as error:
            outcome = reason(error)
        except (ValueError, LookupError, TypeError):
            outcome = WRONG
        # The pace of the client is no latency of the server's.
        self._record(due, self._loop.time(), kind, "1.1", outcome, status if outcome in (OK, STATUS) else 0)
        return outcome == OK

    async def _upload(self) -> bool:
        number = self._number()

        async def work() -> None:
            event = await self._once("POST", "/v1/events", self._event(number, UPLOAD_BYTES), sending=UPLOAD_SECONDS)
            self.result.acknowledged[event["payload"]["n"]] = event["id"]

        return await self._slow("upload", work)

    async def _download(self, identity: int) -> bool:
        async def work() -> None:
            event = await self._once("GET", f"/v1/events/{identity}", reading=DOWNLOAD_SECONDS)
            if len(event["payload"]["fill"]) != DOWNLOAD_BYTES:
                raise ValueError

        return await self._slow("download", work)

    async def _follow(
        self,
        follower: Follower,
        once: Callable[[Follower, str, Callable[[str], None]], Any],
        ready: asyncio.Event,
    ) -> None:
        """Follow the stream for as long as the load lasts, from the last position seen."""
        position = ""

        def at(cursor: str) -> None:
            nonlocal position
            position = cursor
            ready.set()

        while True:
            due = self._loop.time()
            pause: float | None = None

            async def work() -> None:
                nonlocal pause
                pause = await once(follower, position, at)

            if await self._slow(follower.protocol, work):
                self.result.records.pop()  # told to come back: no failure, and no request of its own
                follower.told += 1
                await asyncio.sleep(pause or 0)
            else:
                follower.cut += 1
                await asyncio.sleep(max(0.0, 0.5 - (self._loop.time() - due)))

    async def _sse(self, follower: Follower, position: str, at: Callable[[str], None]) -> float:
        """Follow until told to come back; return in how many seconds."""
        http = h11.Connection(h11.CLIENT)
        headers = [("host", self.domain), ("accept", "text/event-stream")]
        if position:
            headers.append(("last-event-id", position))
        async with self._stream() as (reader, writer):
            request = h11.Request(method="GET", target="/v1/events/stream", headers=headers)
            writer.write((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
            async with asyncio.timeout(self.timeout):
                answer = await self._head(http, reader)
            if answer.status_code != 200:
                raise _Status(answer.status_code)
            retry, text = 0.0, b""
            while not isinstance(event := http.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    http.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Data):
                    text += event.data
                    *messages, text = text.split(b"\n\n")
                    for message in messages:
                        fields = dict(
                            line.split(b": ", 1) for line in message.split(b"\n") if not line.startswith(b":")
                        )
                        if b"data" in fields:
                            follower.seen.append(json.loads(fields[b"data"])["id"])
                        if b"id" in fields:
                            at(fields[b"id"].decode())
                        retry = float(fields.get(b"retry", 0)) / 1000
            if not retry:
                raise EOFError  # an end without being told when to come back
            return retry

    async def _websocket(self, follower: Follower, position: str, at: Callable[[str], None]) -> float:
        """Follow until told to come back; return in how many seconds."""
        try:
            async with websocket_connect(
                f"wss://{self.domain}:{self.port}/v1/events/ws"
                + (f"?cursor={quote(position, safe='')}" if position else ""),
                host=self.address,
                port=self.port,
                ssl=self._contexts["1.1"],
                server_hostname=self.domain,
                compression=None,
                proxy=None,
                open_timeout=self.timeout,
                close_timeout=1,
            ) as connection:
                while True:
                    message = json.loads(await connection.recv())
                    if message["event"]:
                        follower.seen.append(message["event"]["id"])
                    at(message["cursor"])
        except InvalidHandshake as error:
            answer = getattr(error, "response", None)
            raise _Status(answer.status_code if answer else 0) from error
        except ConnectionClosed as closed:
            if closed.rcvd is None or closed.rcvd.code != SERVICE_RESTART:
                raise EOFError from closed
            return random.uniform(0.1, 0.5)  # noqa: S311 - spreads reconnects, no secret


class _Status(Exception):
    """An answer with another status than was due."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Running:
    """A load that runs in a thread of its own while the caller does blocking things."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._stopping = threading.Event()
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="load", daemon=True)

    @property
    def result(self) -> Result:
        """What happened so far; complete after the end of the context."""
        return self._load.result

    def _work(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._failure = error
        self._started.set()

    async def _main(self) -> None:
        async with self._load:
            self._started.set()
            while not self._stopping.is_set():
                await asyncio.sleep(0.05)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        if self._failure:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        if self._failure:
            raise self._failure


def running(address: str, domain: str, cafile: str | Path, **options: Any) -> Running:
    """Put a host under load for the length of a `with` block; see Load for the options."""
    return Running(Load(address, domain, cafile, **options))


def capacity(address: str, domain: str, cafile: str | Path, *, seconds: float = 5.0, **options: Any) -> float:
    """Measure the requests a second that the clients get through in a closed loop.

    Raises:
        RuntimeError: a request failed, so that the figure would mean nothing.
    """
    with running(address, domain, cafile, rate=None, extras=False, **options) as load:
        time.sleep(1 + seconds)
    result = load.result
    if result.failed:
        raise RuntimeError(f"expected no failure while measuring; found {result.counts()}")
    return len(result.between(result.began + 1, result.ended)) / (result.ended - result.began - 1)


def lost_and_doubled(result: Result, rows: Iterator[tuple[int, int]]) -> tuple[set[int], set[int]]:
    """Compare what was acknowledged with the table.

    Args:
        rows: id and the payload's number of every event of the run, as STORED selects them.

    Returns:
        The numbers that were acknowledged and are not in the table under their id, and those that are there twice.
    """
    stored = list(rows)
    there = {(number, identity) for identity, number in stored}
    lost = {number for number, identity in result.acknowledged.items() if (number, identity) not in there}
    return lost, {number for number, times in Counter(number for _, number in stored).items() if times > 1}


STORED = "SELECT id, payload->>'n' FROM event WHERE payload->>'run' = '{run}'"
"""Id and number of every event of a run."""
