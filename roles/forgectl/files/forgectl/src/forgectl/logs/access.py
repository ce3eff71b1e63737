"""Reading Nginx's log of an app, with its rotated files.

Logs of gigabytes cost neither memory nor patience. A rotated file names the time at which it was closed, so those
that end too early are not opened. In one that is not compressed, a time is found by bisection, since lines are in
order. What is read goes by in blocks of a mebibyte.
"""

import gzip
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import datetime
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

BLOCK_BYTES = 1024 * 1024
# What a client sends is at most 32 KiB, and as escaped JSON six times that.
LONGEST_LINE = 512 * 1024
# Nginx writes on into a renamed file until it has reopened; and its workers do not log in perfect order.
SLACK_SECONDS = 5.0
ROTATED = re.compile(r"-\d{8}-(?P<closed>\d+)(?:\.gz)?")


class Line(msgspec.Struct):
    """A request, as Nginx logged it at its end. Durations are in seconds, `at` is a Unix time.

    Files from before a field was logged lack it: then `at` and `connection` are 0, and no request is a `stream`.
    """

    timestamp: str
    request_id: str = ""
    client: str = ""
    method: str = ""
    path: str = ""
    status: int = 0
    bytes: int = 0
    duration: float = 0.0
    upstream_status: str = ""
    upstream_duration: str = ""
    release: str = ""
    at: float = 0.0
    connection: int = 0
    stream: int = 0

    @property
    def is_stream(self) -> bool:
        """Whether it was to last: its duration is no latency."""
        return bool(self.stream) or self.status == 101

    @property
    def by_app(self) -> bool:
        """Whether the app answered, and not Nginx in its place: each worker names its release."""
        return bool(self.release)

    @property
    def is_closed(self) -> bool:
        """Whether it met the maintenance page: nothing else lets Nginx answer 503 without asking the app."""
        return self.status == 503 and not self.upstream_status and not self.release


DECODER = msgspec.json.Decoder(Line)


class Part(NamedTuple):
    """One file of a log; what is in it was logged between two Unix times, give or take SLACK_SECONDS."""

    path: Path
    began: float
    ended: float

    @property
    def packed(self) -> bool:
        """Whether it is compressed, and has to be read from its start."""
        return self.path.suffix == ".gz"


def parts(log: Path) -> list[Part]:
    """The files of a log, oldest first; the one that is written to has no end."""
    closed: list[tuple[float, Path]] = []
    for path in log.parent.glob(f"{log.name}[-.]*"):
        found = ROTATED.fullmatch(path.name.removeprefix(log.name))
        with suppress(FileNotFoundError):
            closed.append((float(found["closed"]) if found else path.stat().st_mtime, path))
    listed, began = [], 0.0
    for ended, path in sorted(closed):
        listed.append(Part(path, began, ended))
        began = ended
    return [*listed, Part(log, began, float("inf"))] if log.exists() else listed


def decode(raw: bytes) -> Line | None:
    """A line, with its time filled in; None when it is none of Nginx's, as what a full disk cut off."""
    try:
        line = DECODER.decode(raw)
        line.at = line.at or datetime.fromisoformat(line.timestamp).timestamp()
    except (msgspec.DecodeError, ValueError):
        return None
    return line


def length(part: Part, since: float) -> int:
    """How many bytes read() gives of a file without a budget."""
    with suppress(OSError, struct.error):
        path = _present(part.path)
        with path.open("rb") as file:
            if path.suffix != ".gz":
                return os.fstat(file.fileno()).st_size - find(file, since - SLACK_SECONDS)
            # What gzip itself says, up to 4 GiB (RFC 1952, ISIZE).
            file.seek(-4, os.SEEK_END)
            return int(struct.unpack("<I", file.read())[0])
    return 0


def read(part: Part, since: float = 0.0, budget: int | None = None) -> Iterator[bytes]:
    """The raw lines of a file, a little before a Unix time and on; with `budget` at most so many bytes, its last.

    A compressed file is read as a whole. One that is gone or damaged ends where that shows.
    """
    with suppress(OSError, EOFError, zlib.error), ExitStack() as opened:
        path = _present(part.path)
        if path.suffix == ".gz":
            # Nothing but what is written: its own buffer is small.
            file: BinaryIO = opened.enter_context(gzip.open(path, "rb"))  # type: ignore[assignment]
            yield from split(file)
            return
        plain = opened.enter_context(path.open("rb"))
        size = os.fstat(plain.fileno()).st_size
        start = find(plain, since - SLACK_SECONDS)
        if budget is not None and size - start > budget:
            start = size - budget
            plain.seek(start)
            plain.readline(LONGEST_LINE)
        yield from split(plain)


def split(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file from where it is."""
    rest = b""
    while block := file.read(BLOCK_BYTES):
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        yield from lines
        if len(rest) > LONGEST_LINE:
            rest = b""
    if rest:
        yield rest


def find(file: BufferedReader, since: float) -> int:
    """Go to a line of an open file that is not after a Unix time, and not long before; returns where that is."""
    low, high = 0, os.fstat(file.fileno()).st_size
    while high - low > BLOCK_BYTES:
        middle = (low + high) // 2
        at = _time_after(file, middle)
        # What can't be read says nothing: then from further up.
        if at is not None and at < since:
            low = middle
        else:
            high = middle
    file.seek(low)
    if low:
        file.readline(LONGEST_LINE)
    return file.tell()


def search(log: Path, request_id: str, since: float = 0.0) -> tuple[list[Line], float]:
    """The lines of a request id, newest file first, and the Unix time down to which was searched."""
    needle = f'"request_id":"{request_id}"'.encode()
    down_to = float("inf")
    for part in reversed(parts(log)):
        if part.ended + SLACK_SECONDS < since:
            break
        down_to = part.began
        if hits := [line for line in _hits(part, needle) if line.request_id == request_id]:
            return hits, down_to
    return [], down_to


def lines(
    log: Path,
    since: float,
    unreadable: Callable[[], None] = lambda: None,
    budget: int | None = None,
    cut: Callable[[], None] = lambda: None,
) -> Iterator[Line]:
    """The requests that ended at a Unix time or later; with `budget` those in so many bytes, the newest.

    The newest file comes first, so that a rotation meanwhile hides none. `cut` is called where older ones are left out.
    """
    for part in reversed(parts(log)):
        if part.ended + SLACK_SECONDS < since:
            break
        long = 0 if budget is None else length(part, since)
        if budget is not None and long > budget:
            cut()
            if part.packed:
                break
        for raw in read(part, since, None if part.packed else budget):
            line = decode(raw)
            if line is None:
                unreadable()
            elif line.at >= since:
                yield line
        if budget is not None:
            if long > budget:
                break
            budget -= long


class Tail:
    """What is added to a log from now on, over its rotations."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._files: list[BufferedReader] = []
        self._rest: dict[int, bytes] = {}
        self._open(at_end=True)

    def new(self) -> Iterator[Line]:
        """The requests that were logged since the last call."""
        self._open()
        for file in list(self._files):
            yield from self._read(file)
        # Nginx still writes into a file that was renamed until it has reopened: it goes when the next one is.
        while len(self._files) > 2:
            self._close(self._files[0])

    def close(self) -> None:
        """Let go of the files."""
        for file in list(self._files):
            self._close(file)

    def _open(self, at_end: bool = False) -> None:
        with suppress(FileNotFoundError):
            known = {(found.st_dev, found.st_ino) for found in (os.fstat(file.fileno()) for file in self._files)}
            present = self._log.stat()
            if (present.st_dev, present.st_ino) not in known:
                file = self._log.open("rb")
                if at_end:
                    file.seek(0, os.SEEK_END)
                self._files.append(file)

    def _read(self, file: BufferedReader) -> Iterator[Line]:
        while block := file.read(BLOCK_BYTES):
            raws = (self._rest.pop(file.fileno(), b"") + block).split(b"\n")
            if rest := raws.pop()[:LONGEST_LINE]:
                self._rest[file.fileno()] = rest
            for raw in raws:
                if line := decode(raw):
                    yield line

    def _close(self, file: BufferedReader) -> None:
        self._files.remove(file)
        self._rest.pop(file.fileno(), None)
        file.close()


def _present(path: Path) -> Path:
    """Where a file is that may have been compressed meanwhile."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if not path.exists() and packed.exists() else path


def _hits(part: Part, needle: bytes) -> Iterator[Line]:
    with suppress(OSError, EOFError, zlib.error), ExitStack() as opened:
        path = _present(part.path)
        file: BinaryIO = (
            opened.enter_context(gzip.open(path, "rb"))  # type: ignore[assignment]
            if path.suffix == ".gz"
            else opened.enter_context(path.open("rb"))
        )
        rest = b""
        while block := file.read(BLOCK_BYTES):
            # Whole lines, so that none is missed between two blocks.
            whole, newline, tail = (rest + block).rpartition(b"\n")
            rest = tail[:LONGEST_LINE]
            yield from _matching(whole + newline, needle)
        yield from _matching(rest, needle)


def _matching(block: bytes, needle: bytes) -> Iterator[Line]:
    # Of most blocks nothing but this one look is taken.
    if needle in block:
        yield from (line for raw in block.split(b"\n") if needle in raw and (line := decode(raw)))


def _time_after(file: BufferedReader, offset: int) -> float | None:
    """The time of the first line that begins after a place and can be read."""
    file.seek(offset)
    file.readline(LONGEST_LINE)
    for _ in range(8):
        if line := decode(file.readline(LONGEST_LINE)):
            return line.at
    return None
