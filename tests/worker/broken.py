"""An ASGI application that fails to start: in one process once another one starts, and there a little later."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any


async def app(_scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Refuse to start."""
    await receive()
    first, second = (Path(f"{os.environ['EVENTS']}.{name}") for name in ("first", "second"))
    try:
        first.touch(exist_ok=False)
        # One that has no signal handlers yet would be ended before it fails.
        while not second.exists():
            await asyncio.sleep(0.01)
    except FileExistsError:
        second.touch()
        await asyncio.sleep(0.5)
    await send({"type": "lifespan.startup.failed", "message": "broken on purpose"})
