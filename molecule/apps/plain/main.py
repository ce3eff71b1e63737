"""An app as a stranger may have written it: plain text for a log, no path for probes, files where it likes."""

import asyncio
import mmap
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse

print("printed while it is imported")
app = FastAPI()


@app.get("/")
async def greet() -> dict[str, object]:
    """Tell what it knows: its one setting, and the names of all variables."""
    print("printed by a request")
    return {"greeting": os.environ["GREETING"], "worker": os.getpid(), "variables": sorted(os.environ)}


@app.get("/files")
def write() -> dict[str, str]:
    """Write where programs write."""
    home = Path.home() / ".cache" / "plain" / "file"
    home.parent.mkdir(parents=True, exist_ok=True)
    home.write_text("kept")
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"gone")
        return {"home": str(home), "temporary": file.name}


@app.get("/machine-code")
async def compile_it() -> dict[str, bool]:
    """Take memory as a just-in-time compiler does."""
    mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
    return {"compiled": True}


@app.get("/silent/{seconds}")
async def stream(seconds: float) -> StreamingResponse:
    """Send a word, and another after a silence."""

    async def events() -> AsyncIterator[str]:
        yield "data: first\n\n"
        await asyncio.sleep(seconds)
        yield "data: last\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


@app.websocket("/echo")
async def echo(socket: WebSocket) -> None:
    """Give back what comes."""
    await socket.accept()
    while True:
        await socket.send_text(await socket.receive_text())
