"""Looking for secrets in whatever a host leaves behind: one pass of grep for all of them, in every form.

Nothing of what is searched is kept, and what was found is named, never shown.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import subprocess
import tarfile
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import IO, NamedTuple
from urllib.parse import quote, quote_plus

FRAGMENT = 16
"""Characters at the beginning of a secret and at its end, which are searched for: what was cut off is found as well."""
SHORTEST = 16
"""Characters; what is shorter is found by chance."""
CHUNK = 1 << 20
# All of a program is unpacked already; what an app or a log compresses is elsewhere.
PROGRAMS = ("usr/",)


class Found(NamedTuple):
    """Where a secret lies."""

    place: str
    secret: str
    """Its name."""
    form: str
    """plain, json, url, hex or base64."""


def forms(secret: str) -> dict[bytes, str]:
    """The byte strings that give a secret away, each with the form that it is in."""
    found: dict[bytes, str] = {}
    for fragment in (secret[:FRAGMENT], secret[-FRAGMENT:]):
        raw = fragment.encode()
        for form, pattern in (
            ("plain", raw),
            ("json", json.dumps(fragment)[1:-1].encode()),
            ("json", json.dumps(fragment, ensure_ascii=False)[1:-1].encode()),
            ("url", quote(fragment, safe="").encode()),
            ("url", quote_plus(fragment).encode()),
            ("hex", raw.hex().encode()),
            ("hex", raw.hex().upper().encode()),
            *(("base64", pattern) for before in range(3) for pattern in _base64(raw, before)),
        ):
            # grep takes a line for a pattern, and zeros are taken out; the other forms have them in another way.
            if not set(b"\n\0") & set(pattern):
                found.setdefault(pattern, form)
    return found


def _base64(raw: bytes, before: int) -> Iterator[bytes]:
    """What is sure of the base64 of some bytes when `before` (0 to 2) others come first, in both alphabets."""
    sure = slice(-(-before * 8 // 6), (before + len(raw)) * 8 // 6)
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        yield encode(b"\0" * before + raw)[sure]


class Search:
    """A search for secrets, given as value by name.

    Raises:
        ValueError: one is too short to be found for sure.
    """

    def __init__(self, secrets: Mapping[str, str]) -> None:
        if short := [name for name, value in secrets.items() if len(value) < SHORTEST]:
            raise ValueError(f"expected secrets of {SHORTEST} characters and more; found shorter: {', '.join(short)}")
        self._patterns: dict[bytes, tuple[str, str]] = {}
        for name, value in secrets.items():
            for pattern, form in forms(value).items():
                self._patterns.setdefault(pattern, (name, form))

    def text(self, content: str | bytes, place: str) -> set[Found]:
        """Search a text."""
        raw = content.encode(errors="surrogateescape") if isinstance(content, str) else content
        return self.stream(io.BytesIO(raw), place)

    def stream(self, stream: IO[bytes], place: str) -> set[Found]:
        """Search all that comes through a stream."""
        with _Grep(self._patterns) as grep:
            while chunk := stream.read(CHUNK):
                grep.feed(chunk)
        return {Found(place, *self._patterns[pattern]) for _, pattern in grep.matches}

    def archive(self, stream: IO[bytes]) -> set[Found]:
        """Search a tar archive, names and all; the places are its members."""
        found: set[Found] = set()
        offsets: list[int] = []
        names: list[str] = []
        with _Grep(self._patterns) as grep:
            tee = _Tee(stream, grep.feed)
            with tarfile.open(fileobj=tee, mode="r|") as tar:
                for member in tar:
                    offsets.append(member.offset)
                    names.append(member.name)
                    # So that they do not pile up.
                    tar.members = []  # type: ignore[attr-defined]
                    if member.isfile() and member.name.endswith(".gz") and not member.name.startswith(PROGRAMS):
                        content = tar.extractfile(member)
                        assert content is not None
                        # What is none, or no whole one, was looked through as it is.
                        with suppress(gzip.BadGzipFile, EOFError):
                            found |= self.text(gzip.decompress(content.read()), member.name)
            while tee.read(CHUNK):
                pass
        for offset, pattern in grep.matches:
            found.add(Found(names[bisect_right(offsets, offset) - 1], *self._patterns[pattern]))
        return found


class _Tee(io.RawIOBase):
    """Passes on whatever is read from a stream."""

    def __init__(self, stream: IO[bytes], feed: Callable[[bytes], None]) -> None:
        self._stream, self._feed = stream, feed

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._feed(data)
        return data


class _Grep:
    """grep over what it is fed; afterwards `matches` has the offset (bytes) and the pattern of each."""

    def __init__(self, patterns: Mapping[bytes, object]) -> None:
        self.matches: list[tuple[int, bytes]] = []
        reading, writing = os.pipe()
        options = ("--fixed-strings", "--text", "--only-matching", "--byte-offset", f"--file=/dev/fd/{reading}")
        self._process = subprocess.Popen(
            ["grep", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(reading,),
            env=os.environ | {"LC_ALL": "C"},
        )
        os.close(reading)
        # By a pipe: secrets are no arguments, and no files either.
        with os.fdopen(writing, "wb") as file:
            file.write(b"\n".join(patterns) + b"\n")
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def feed(self, data: bytes) -> None:
        assert self._process.stdin is not None
        # grep holds a whole line in memory, and there may be gigabytes of zeros.
        self._process.stdin.write(data.replace(b"\0", b"\n"))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            offset, _, pattern = line.rstrip(b"\n").partition(b":")
            self.matches.append((int(offset), pattern))

    def __enter__(self) -> _Grep:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        # 1: nothing was found.
        if self._process.wait() not in (0, 1):
            raise ChildProcessError(f"expected grep to search; found: it ended with {self._process.returncode}")
