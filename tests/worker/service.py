"""An ASGI application that tells a file when it serves and when it ends, and says which process answered."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

_made: list[list[str]] = []


def _tell(event: str) -> None:
    with Path(os.environ["EVENTS"]).open("a") as events:
        events.write(f"{time.monotonic()} {os.getpid()} {event}\n")


async def _lifespan(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await receive()
    _made.append(["by its start"])
    await asyncio.sleep(float(os.environ.get("BOOT_S", "0")))
    scope["state"]["draining"] = draining = asyncio.Event()
    watch = asyncio.create_task(draining.wait())
    watch.add_done_callback(lambda _: _tell("leaves"))
    _tell("serves")
    await send({"type": "lifespan.startup.complete"})
    await receive()
    _tell("ended")
    await send({"type": "lifespan.shutdown.complete"})


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer with the process and what of the request arrived.

    /stream never ends, /block stands still, and /collected says whether the collector looks at what the start made.
    """
    if scope["type"] == "lifespan":
        await _lifespan(scope, receive, send)
        return
    if scope["path"] == "/block":
        time.sleep(60)
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while scope["path"] == "/stream":
        await send({"type": "http.response.body", "body": b"more", "more_body": True})
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.002)
    answer = {"pid": os.getpid(), "method": scope["method"], "bytes": len(body)}
    if scope["path"] == "/collected":
        answer["collected"] = any(known is _made[0] for known in gc.get_objects())
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})
