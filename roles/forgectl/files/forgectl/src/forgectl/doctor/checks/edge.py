"""Nginx: whether it runs and answers, whether its configuration would hold, and how many of its answers are errors."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import msgspec

from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.sight import HOUR, NGINX, Sight, shorten

PORTS = (80, 443)
CONNECT_SECONDS = 1.0
# Of an access log, the end that is read: half a minute at 1000 requests/s, an hour at 10.
LOG_BYTES = 8 * 1024 * 1024
MANY, SHARE = 10, 0.01
# It goes on as long as some of the newest requests failed: those of the last minute, and so many at least.
RECENT_SECONDS, RECENT_LEAST = 60.0, 50


class Line(msgspec.Struct):
    """What is read of a line of the access log."""

    timestamp: str
    status: int = 0
    path: str = ""
    upstream_status: str = ""


def nginx(sight: Sight) -> Iterator[Finding]:
    """F801: the unit, and whether somebody listens."""
    unit = sight.unit(NGINX)
    if unit["ActiveState"] not in ("active", "reloading"):
        evidence = [f"{NGINX} is {unit['ActiveState']} ({unit['Result']})", *sight.last_words(NGINX)]
        yield Finding("F801", HOST, f"Nginx is {unit['ActiveState']}", evidence, "sudo systemctl start nginx")
        return
    if deaf := [f"127.0.0.1:{port}: {why}" for port in PORTS if (why := _refused(port))]:
        evidence = [f"{NGINX} is active", *deaf]
        yield Finding("F801", HOST, "Nginx runs and does not answer", evidence, "sudo systemctl restart nginx")


def configuration(sight: Sight) -> Iterator[Finding]:
    """F802: `nginx -t`, which is what a reload and a start go by."""
    done = sight.attempt("nginx", "-t", "-q")
    if done.returncode:
        lines = [shorten(line) for line in done.stderr.splitlines() if line.strip()]
        title = f"Nginx would not take its configuration: {lines[0] if lines else 'nginx -t fails'}"
        yield Finding("F802", HOST, title, tuple(f"nginx -t: {line}" for line in lines[:5]), "sudo nginx -t")


def errors(sight: Sight) -> Iterator[Finding]:
    """F803: answers of 5xx in the last hour, from the access log of each app."""
    now = time.time()
    for app in sight.apps:
        lines = _last_hour(app.layout.access_log, now)
        failed = [line for _, line in lines if line.status >= 500]
        if len(failed) < MANY or len(failed) < SHARE * len(lines):
            continue
        newest = [line for at, line in lines if at > now - RECENT_SECONDS]
        if len(newest) < RECENT_LEAST:
            newest = [line for _, line in lines[-RECENT_LEAST:]]
        still = sum(line.status >= 500 for line in newest)
        paths = [line.path for line in failed]
        most = max(set(paths), key=paths.count)
        kinds = sorted({line.status for line in failed})
        title = f"{len(failed)} of {len(lines)} answers of the last hour were 5xx ({len(failed) / len(lines):.1%})"
        evidence = [
            f"{app.layout.access_log}: status {', '.join(map(str, kinds))}; most often {most} ({paths.count(most)})",
            f"of the newest {len(newest)} requests, {still} failed",
        ]
        yield Finding("F803", app.name, title, evidence, f"sudo forgectl rollback {app.name}", over=not still)


def _refused(port: int) -> str:
    """Why nobody can connect; empty where somebody can."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return str(error)
    return ""


def _last_hour(log: Path, now: float) -> list[tuple[float, Line]]:
    found = []
    for path in (log.with_name(log.name + ".1"), log):
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_mtime < now - HOUR:
                    continue
                file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
                raw = file.read()
        except OSError:
            continue
        for text in raw.splitlines():
            # Where the reading began, a line is in pieces.
            with suppress(msgspec.DecodeError, ValueError):
                line = msgspec.json.decode(text, type=Line)
                at = datetime.fromisoformat(line.timestamp).timestamp()
                if at > now - HOUR:
                    found.append((at, line))
    return found
