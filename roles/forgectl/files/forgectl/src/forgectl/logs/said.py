"""What a line of a log says, whoever wrote it: an app, Nginx, PostgreSQL."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

# Under which names apps have these in their objects; the first is the reference app's.
LEVEL_KEYS, TEXT_KEYS = ("level", "levelname", "severity", "log_level"), ("message", "msg", "event")
TRACE_KEYS = ("traceback", "exception", "exc_info", "stack")
ERROR_LEVELS = frozenset({"ERROR", "CRITICAL", "FATAL", "PANIC", "ALERT", "EMERGENCY"})
# What journalctl can sort out by itself; what is left is looked at in full. Without capitals it ignores case.
MAYBE_ERROR = "error|exception|critical|fatal|panic"
PLAIN_LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL|FATAL)\b")
EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Timeout)\b(?::|$)")
# The prefix is that of roles/postgresql (log.conf.j2); a process of the server's own has none.
DATABASE = re.compile(r"(?:(?P<role>\S*)@(?P<database>\S*) )?(?P<level>[A-Z]+[1-5]?):  (?P<text>.*)", re.DOTALL)
STATEMENT_TOOK = re.compile(r"duration: ([\d.]+) ms")
# Nginx says on which connection: "[error] 31#31: *17 connect() to unix:/run/..."
CONNECTION = re.compile(r"\*(?P<connection>\d+) (?P<text>.*)", re.DOTALL)
# What differs between two errors that are one.
VARYING = re.compile(r"0x[0-9a-fA-F]+|\b[0-9a-fA-F]{8,}(?:-[0-9a-fA-F]+)*\b|\d+")
# In a path, a part with a digit, which `v1` is not meant to be.
ID = re.compile(r"^(?!v\d{1,2}$).*\d")
LONGEST_NAME = 40
SHOWN = 200


class Said(NamedTuple):
    """A line of an app: how bad it is in capitals, what it says, the traceback if there is one, and whose it is."""

    level: str
    text: str
    trace: str = ""
    request_id: str = ""
    database_pids: tuple[int, ...] = ()
    fields: Mapping[str, Any] = MappingProxyType({})

    @property
    def is_error(self) -> bool:
        """Whether somebody should look at it."""
        return self.level in ERROR_LEVELS or bool(self.trace)

    @property
    def reason(self) -> str:
        """What it says in a line: of a traceback its last one, which has the exception."""
        last = next((line for line in reversed(self.trace.splitlines()) if line.strip()), "")
        return f"{self.text}: {last.strip()}" if last else self.text


def by_app(message: str) -> Said:
    """Read a line of an app: an object of whatever keys, or text."""
    if message.startswith("{"):
        try:
            found = msgspec.json.decode(message)
        except msgspec.DecodeError:
            found = None
        if isinstance(found, dict):
            pids = found.get("database_pids")
            return Said(
                _first(found, LEVEL_KEYS).upper(),
                _first(found, TEXT_KEYS) or message,
                _first(found, TRACE_KEYS),
                str(found.get("request_id") or ""),
                tuple(pid for pid in pids if isinstance(pid, int)) if isinstance(pids, list) else (),
                found,
            )
    level = PLAIN_LEVEL.search(message[:SHOWN])
    # An exception ends a traceback, whose other lines are entries of their own and say less.
    return Said("ERROR" if EXCEPTION.match(message) else level[1] if level else "", message)


class Statement(NamedTuple):
    """A line of PostgreSQL: who it was for, how bad it is in capitals, and the seconds that a statement took."""

    role: str
    database: str
    level: str
    text: str
    seconds: float

    @property
    def is_error(self) -> bool:
        """Whether somebody should look at it."""
        return self.level in ERROR_LEVELS


def by_database(message: str) -> Statement | None:
    """Read a line of PostgreSQL; None for one of another form."""
    found = DATABASE.fullmatch(message)
    if found is None:
        return None
    took = STATEMENT_TOOK.match(found["text"])
    seconds = float(took[1]) / 1000 if took else 0.0
    return Statement(found["role"] or "", found["database"] or "", found["level"], found["text"], seconds)


def alike(text: str) -> str:
    """The text without what differs from one occurrence to the next, and no longer than what is shown."""
    return VARYING.sub("#", text.splitlines()[0] if text else "")[:SHOWN]


def route(path: str) -> str:
    """A path without its ids, so that few groups have many requests."""
    return "/".join("*" if ID.search(part) or len(part) > LONGEST_NAME else part for part in path.split("/"))[:SHOWN]


def plain(line: str) -> str:
    """A line that does nothing to a terminal, whatever a client has sent."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def _first(found: dict[str, Any], keys: tuple[str, ...]) -> str:
    return next((value for key in keys if isinstance(value := found.get(key), str)), "")
