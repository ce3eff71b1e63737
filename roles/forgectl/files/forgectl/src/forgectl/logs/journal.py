"""Reading the journal, as journalctl prints it: an object a line."""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from forgectl.errors import ForgeError
from forgectl.logs.lines import Lines

FIELDS = ("MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "_PID", "_SYSTEMD_UNIT", "UNIT")
# PostgreSQL's syslog_ident; and how a message of it begins (roles/postgresql, log.conf.j2).
DATABASE = "SYSLOG_IDENTIFIER=postgres"
READ_BYTES = 64 * 1024
WORST = 3
"""Priorities down to this one are errors (syslog(3))."""


class Entry(NamedTuple):
    """One entry: its Unix time, and what it says of itself."""

    at: float
    message: str
    identifier: str
    pid: int
    unit: str
    priority: int


def app_units(name: str) -> list[str]:
    """What selects the entries of an app's server, migrations and commands."""
    return [f"--unit={pattern}" for pattern in (f"{name}@*.service", f"{name}-migrate@*.service", f"{name}.*.service")]


def slot_units(name: str) -> list[str]:
    """What selects the entries of its server alone, without a look at which units there are."""
    return [f"_SYSTEMD_UNIT={name}@{slot}.service" for slot in ("blue", "green")]


def command(
    matches: Sequence[str],
    *,
    since: float | None = None,
    until: float | None = None,
    grep: str = "",
    follow: bool = False,
) -> list[str]:
    """The call of journalctl; without --all it would leave out long messages, as those with a traceback are."""
    call = ["journalctl", "--quiet", "--no-pager", "--all", "--output=json", f"--output-fields={','.join(FIELDS)}"]
    if since is not None:
        call.append(f"--since=@{since:.6f}")
    if until is not None:
        call.append(f"--until=@{until:.6f}")
    if grep:
        call.append(f"--grep={grep}")
    return [*call, *(["--follow", "--lines=0"] if follow else []), *matches]


def entries(
    matches: Sequence[str],
    *,
    since: float | None = None,
    until: float | None = None,
    grep: str = "",
    newest_first: bool = False,
) -> Iterator[Entry]:
    """The entries that match, one by one; without those that are longer than any line of a service.

    Raises:
        ForgeError: journalctl failed; it ends with 1 and says nothing where no entry matches.
    """
    call = command(matches, since=since, until=until, grep=grep)
    try:
        process = subprocess.Popen(
            [*call, *(["--reverse"] if newest_first else [])], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError:
        raise ForgeError("expected journalctl on this host; found none; run site.yml first") from None
    with process:
        if process.stdout is None or process.stderr is None:
            return
        try:
            lines = Lines()
            while block := os.read(process.stdout.fileno(), READ_BYTES):
                for raw in lines.of(block):
                    if entry := decode(raw):
                        yield entry
        finally:
            # Whoever has enough of it stops reading.
            process.stdout.close()
            process.terminate()
        words = process.stderr.read(READ_BYTES).decode(errors="replace").strip()
        if process.wait() == 1 and words:
            raise ForgeError(f"journalctl failed: {words}")


def decode(raw: bytes) -> Entry | None:
    """An entry of what journalctl prints; None for a line that is none."""
    try:
        found: Mapping[str, Any] = msgspec.json.decode(raw)
        at = int(found["__REALTIME_TIMESTAMP"]) / 1e6
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        return None
    pid, priority = _text(found.get("_PID")), _text(found.get("PRIORITY"))
    return Entry(
        at,
        _text(found.get("MESSAGE")),
        _text(found.get("SYSLOG_IDENTIFIER")),
        int(pid) if pid.isdigit() else 0,
        _text(found.get("_SYSTEMD_UNIT")) or _text(found.get("UNIT")),
        int(priority) if priority.isdigit() else 6,
    )


def _text(value: object) -> str:
    """A field as text: bytes that are none come as numbers, and a field that is there twice as a list of both."""
    if isinstance(value, list):
        with suppress(TypeError, ValueError):
            return bytes(value).decode(errors="replace")
        return _text(value[0])
    return value if isinstance(value, str) else ""
