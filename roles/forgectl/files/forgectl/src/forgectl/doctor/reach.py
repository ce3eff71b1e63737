"""Reaching others in a bounded time, with the look-up of their name: libc's own limits are longer than a check's."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

Said = TypeVar("Said")


def begin(call: Callable[[], Said]) -> Future[Said]:
    """Have something done in a thread that nobody has to wait for, not even when the process ends."""
    future: Future[Said] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        # For whoever asks for the result.
        except Exception as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def connect(host: str, port: int, seconds: float) -> socket.socket:
    """A connection, within so many seconds in all, however many addresses the name has.

    Raises:
        OSError: there is none; a name that is not resolved in time says so.
    """
    deadline = time.monotonic() + seconds
    looked_up = begin(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    try:
        addresses = looked_up.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"its name {host} was not resolved within {seconds:.1f} s") from None
    except socket.gaierror as error:
        raise OSError(f"its name {host} does not resolve: {error.strerror}") from None
    except ValueError as error:
        # Python's own encoding of it refuses it.
        raise OSError(f"{host} is no name of a host: {error}") from None
    refusal = OSError(f"{host} has no address")
    for kind, _, _, _, address in addresses:
        connection = socket.socket(kind, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            connection.connect(address)
        except OSError as error:
            connection.close()
            refusal = error
        else:
            return connection
    raise refusal
