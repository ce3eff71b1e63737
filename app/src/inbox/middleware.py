"""Pure ASGI middleware: request context and access log, unexpected errors, the limit of request bodies."""

import ipaddress
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inbox import logs
from inbox.metrics import Metrics
from inbox.problems import problem_response

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PROBES = frozenset({"/health", "/ready", "/metrics"})
_CLIENT_GONE = 499  # Nginx's number for a client that left before it was answered

access_logger = logging.getLogger("inbox.access")
logger = logging.getLogger(__name__)


class RequestContext:
    """Gives every request an id, and logs and counts it when it is over."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        token, pids = logs.request_id.set(request_id), logs.database_pids.set(set())
        started = time.perf_counter()
        status: int | None = None
        streams = scope["type"] == "websocket"

        async def observed(message: Message) -> None:
            nonlocal status, streams
            if message["type"] in {"http.response.start", "websocket.http.response.start"}:
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                streams = headers.get("content-type", "").startswith("text/event-stream")
            elif message["type"] == "websocket.accept":
                status = 101
            elif message["type"] == "websocket.close" and status is None:
                status = 403  # closed before it was accepted: what the server answers
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            seconds = time.perf_counter() - started
            self._over(scope, status or _CLIENT_GONE, seconds, streams=streams)
            logs.request_id.reset(token)
            logs.database_pids.reset(pids)

    def _over(self, scope: Scope, status: int, seconds: float, *, streams: bool) -> None:
        method = scope.get("method", "WEBSOCKET")
        route = getattr(scope.get("route"), "path", None)
        self._metrics.answered(method if "method" in scope else "GET", route, status, None if streams else seconds)
        quiet = scope["path"] in _PROBES and status < 400
        access_logger.log(
            logging.DEBUG if quiet else logging.INFO,
            "request",
            extra={
                "client": _address(scope),
                "method": method,
                "path": scope["path"],
                "status": status,
                "duration_ms": round(seconds * 1000, 1),
                "database_pids": sorted(logs.database_pids.get() or ()),
            },
        )


class CatchErrors:
    """Answers what nothing else handled with a 500 that tells the client nothing, and logs the traceback once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def observed(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except Exception:
            if started:
                # Only a broken connection tells the client that its answer is incomplete.
                raise
            logger.exception("unhandled error")
            await problem_response(500)(scope, receive, send)


class BodyLimit:
    """Refuses request bodies above `max_bytes`, declared or counted while they arrive.

    FastAPI's own limit answers a declared length in plain text, outside every middleware of the application.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._detail = f"The body is larger than {max_bytes} bytes."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await problem_response(413, detail=self._detail)(scope, receive, send)
            return
        arrived = 0

        async def counted() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > self._max_bytes:
                raise HTTPException(413, self._detail)
            return message

        await self._app(scope, counted, send)


def _address(scope: Scope) -> str | None:
    # uvicorn has put the address from X-Forwarded-For here when the proxy is trusted; it may be any text.
    host = (scope.get("client") or ("",))[0]
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None
