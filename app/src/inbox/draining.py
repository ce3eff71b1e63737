"""Noticing that this worker shuts down while its streams are still open.

A server waits for open responses before it sends `lifespan.shutdown`, so a stream that ends only then never ends.
Streams therefore watch an `asyncio.Event`. The lifespan state carries it under the key `draining`, which is the hook
for a server: it may set `lifespan.state["draining"]` before it stops. Where the server does not, the signal that
stops the worker sets it.
"""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def set_by_signals(draining: asyncio.Event) -> Iterator[None]:
    """Set `draining` when SIGTERM or SIGINT arrives, then do what the server does on that signal.

    The server's handlers have to be in place: uvicorn installs them before it starts the lifespan. Outside the main
    thread, and where there is no handler to continue with, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def drain(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(draining.set)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    ours = [number for number, handler in before.items() if callable(handler)]
    for number in ours:
        signal.signal(number, drain)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is drain:
                signal.signal(number, before[number])
