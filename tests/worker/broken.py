"""An ASGI application that fails to start: in the first process at once, in others a little later."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any


async def app(_scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Refuse to start."""
    await receive()
    try:
        Path(f"{os.environ['EVENTS']}.first").touch(exist_ok=False)
    except FileExistsError:
        await asyncio.sleep(0.5)
    await send({"type": "lifespan.startup.failed", "message": "broken on purpose"})
