"""The lock that lets one command at a time change an app.

It is a flock, which the kernel drops with its holder however that ends, so there is nothing to release by hand. The
file's content only says who holds it, and means nothing while nobody does.
"""

import fcntl
import os
import pwd
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from forgectl.errors import Locked
from forgectl.layout import Layout

# A look at the lock takes it for microseconds: that must not count as a holder.
GRACE_SECONDS = 0.2
# What nobody asked for just now, by its reason: whoever comes meanwhile waits for it, and need not know of it.
ROUTINES = ("recycle", "secrets rotate", "watch", "drain")
ROUTINE_SECONDS = 120.0


class Holder(msgspec.Struct, frozen=True):
    """Who holds the lock, what for, and since when (Unix time)."""

    pid: int
    by: str
    reason: str
    since: float

    def __str__(self) -> str:
        return f"{self.reason} by {self.by}, process {self.pid}, since {max(0.0, time.time() - self.since):.0f} s"


def person() -> str:
    """Who called: the person behind sudo, or the user."""
    return os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name


@contextmanager
def hold(layout: Layout, reason: str, patience: float = GRACE_SECONDS) -> Iterator[None]:
    """Hold the lock of an app; wait at most `patience` seconds for other holders, and longer while it is a routine one.

    Raises:
        Locked: someone else holds it.
    """
    layout.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(layout.state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        began = excused = time.monotonic()
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                found = _read(descriptor)
                now = time.monotonic()
                if found is not None and found.reason in ROUTINES and now - began < ROUTINE_SECONDS:
                    excused = now
                if now - excused > patience:
                    raise Locked(
                        f"{layout.name} is locked ({_describe(found)}); wait until that command has ended, then try "
                        "again"
                    ) from None
                time.sleep(0.02)
        _write(descriptor, msgspec.json.encode(Holder(os.getpid(), person(), reason, time.time())))
        yield
        _write(descriptor, b"")
    finally:
        os.close(descriptor)


def holder(layout: Layout) -> Holder | None:
    """Who holds the lock now, if anyone."""
    try:
        descriptor = os.open(layout.state_dir / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _read(descriptor) or Holder(0, "unknown", "unknown", time.time())
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    # Who holds it is for people; a full disk must not keep an app from coming back after a boot.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)


def _read(descriptor: int) -> Holder | None:
    try:
        return msgspec.json.decode(os.pread(descriptor, 4096, 0), type=Holder)
    except msgspec.DecodeError:
        return None


def _describe(found: Holder | None) -> str:
    return str(found) if found else "by a command that has only just begun"
