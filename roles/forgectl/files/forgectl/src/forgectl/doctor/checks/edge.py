"""Nginx: whether it runs and answers, whether its configuration would hold, and how many of its answers are errors."""

import heapq
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from forgectl.doctor.findings import HOST, Finding
from forgectl.doctor.sight import HOUR, NGINX, Sight, shorten, span
from forgectl.logs import access, said
from forgectl.logs.overview import MOST_GROUPS, SERVER_ERROR

PORTS = (80, 443)
CONNECT_SECONDS = 1.0
# Of the logs of all apps: an hour at 50 requests/s, and half a second of a core.
LOG_BYTES = 64 * 1024 * 1024
MANY, SHARE = 10, 0.01
# It goes on as long as such a share of the newest requests fails: those of the last minute, or so many. On a host that
# few ask, what is older than this says nothing of now.
RECENT_SECONDS, RECENT_LEAST, OLDEST_SECONDS = 60.0, 50, 300.0


@dataclass
class _Seen:
    """What a log has of the last hour: how many requests, which failed, and how many of the newest did.

    What the maintenance page answered is `closed`, and none of these: it is there on purpose, and a finding of its own.
    """

    began: float
    requests: int = 0
    closed: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    paths: Counter[str] = field(default_factory=Counter)
    recent: int = 0
    of_recent: int = 0
    newest: list[tuple[float, int, bool]] = field(default_factory=list)
    cut: bool = False


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
    # A removed one answers nobody, and no release of it would.
    apps = [app for app in sight.apps if not (app.state and app.state.removed)]
    for app in apps:
        seen = _counted(app.layout.access_log, now, LOG_BYTES // len(apps))
        failed = seen.statuses.total()
        if failed < MANY or failed < SHARE * seen.requests:
            continue
        still, newest = seen.recent, seen.of_recent
        if newest < RECENT_LEAST:
            recent = [fails for at, _, fails in seen.newest if at > now - OLDEST_SECONDS]
            still, newest = sum(recent), len(recent)
        ((most, times),) = seen.paths.most_common(1)
        kinds = ", ".join(map(str, sorted(seen.statuses)))
        whence = f"{span(now - seen.began)}, of which more is not read," if seen.cut else "hour"
        title = f"{failed} of {seen.requests} answers of the last {whence} were 5xx ({failed / seen.requests:.1%})"
        evidence = [
            f"{app.layout.access_log}: status {kinds}; most often {most} ({times})",
            f"of the newest {newest} requests, {still} failed"
            if newest
            else f"nobody asked in the last {span(OLDEST_SECONDS)}",
            *([f"{seen.closed} more met the maintenance page"] if seen.closed else []),
        ]
        over = not still or still < SHARE * newest
        yield Finding("F803", app.name, title, evidence, f"sudo forgectl logs --app {app.name} --errors", over=over)


def _counted(log: Path, now: float, budget: int) -> _Seen:
    """Count the last hour, whatever was rotated meanwhile; of a busy log the newest bytes of it."""
    seen = _Seen(began=now)

    def cut() -> None:
        seen.cut = True

    for number, line in enumerate(access.lines(log, now - HOUR, budget=budget, cut=cut)):
        seen.began = min(seen.began, line.at)
        if line.is_closed:
            seen.closed += 1
            continue
        fails = line.status >= SERVER_ERROR
        seen.requests += 1
        if fails:
            seen.statuses[line.status] += 1
            path = said.route(line.path)
            seen.paths[path if path in seen.paths or len(seen.paths) < MOST_GROUPS else "others"] += 1
        if line.at > now - RECENT_SECONDS:
            seen.of_recent += 1
            seen.recent += fails
        if len(seen.newest) < RECENT_LEAST:
            heapq.heappush(seen.newest, (line.at, number, fails))
        else:
            heapq.heappushpop(seen.newest, (line.at, number, fails))
    return seen


def _refused(port: int) -> str:
    """Why nobody can connect; empty where somebody can."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return str(error)
    return ""
