"""One request on its way: what Nginx, the app and PostgreSQL say of it, in the order of time."""

from collections.abc import Iterator, Sequence

import msgspec

from forgectl.config import App
from forgectl.layout import Layout
from forgectl.logs import access, journal, said
from forgectl.logs.access import Line
from forgectl.logs.window import clock, stamp

# The app may log a moment after Nginx has; and older logs of Nginx have no fraction of the second.
BEFORE_SECONDS, AFTER_SECONDS = 1.1, 2.0
# Nginx logs an error while it has the request; a connection may bring the next one soon.
NGINX_SECONDS = 0.02
# Nginx's statuses for a client that left, and for an app that took too long: that goes on for a while.
LEFT = (499, 504)
# Lines that may belong to it are many on a busy host.
MOST_GUESSES = 20
# Where Nginx knows nothing of it.
WITHOUT_NGINX_SECONDS = 24 * 3600.0


class Event(msgspec.Struct):
    """Something that happened on the way. `surely`: it names the request, its connection or its database process."""

    time: str
    source: str
    text: str
    level: str = ""
    pid: int = 0
    unit: str = ""
    surely: bool = True
    detail: str = ""
    at: float = 0.0


class Trace(msgspec.Struct):
    """A request id: the app, its line of Nginx's log, what happened, and what nobody says and why."""

    request_id: str
    app: str
    request: Line | None
    events: list[Event]
    missing: list[str]


def of(apps: Sequence[tuple[Layout, App]], request_id: str, now: float, since: float | None) -> Trace | None:
    """Find a request id in the logs of some apps; None when nobody knows it.

    Of Nginx's logs all that are kept are searched, the newest first, and with `since` none from before that.
    """
    found = [(layout, app, hits[0]) for layout, app in apps if (hits := _of_nginx(layout, request_id, since))]
    if found:
        layout, app, line = found[0]
        return _assembled(app, request_id, line)
    began = now - WITHOUT_NGINX_SECONDS if since is None else since
    for layout, app in apps:
        if events := [event for event, _ in _of_app(app, request_id, began, now)]:
            missing = [f"Nginx's logs that are kept do not know it: {layout.access_log}"]
            return Trace(request_id, app.name, None, events, missing)
    return None


def text(trace: Trace) -> Iterator[str]:
    """The same for a person."""
    if line := trace.request:
        took = f"{line.duration:.3f} s" + (f", the app {line.upstream_duration} s of it" if line.by_app else "")
        who = f"release {line.release}" if line.release else "Nginx by itself"
        yield f"{trace.app}  {line.method} {line.path}  {line.status} in {took}"
        yield f"  {line.timestamp}  client {line.client}, {line.bytes} bytes, answered by {who}"
    else:
        yield f"{trace.app}  request {trace.request_id}"
    for event in trace.events:
        mark = " " if event.surely else "?"
        where = f"{event.source}[{event.pid}]" if event.pid else event.source
        level = f"{event.level} " if event.level not in ("", "INFO", "LOG") else ""
        yield f"{mark} {clock(event.at)}  {where:<18}  {level}{event.text}"
        yield from (f"{'':17}{each}" for each in event.detail.splitlines())
    if any(not event.surely for event in trace.events):
        yield "? may be of another request at the same time"
    for each in trace.missing:
        yield f"missing: {each}"


def _of_nginx(layout: Layout, request_id: str, since: float | None) -> list[Line]:
    hits, _ = access.search(layout.access_log, request_id, since or 0.0)
    return hits


def _assembled(app: App, request_id: str, line: Line) -> Trace:
    began, ended = line.at - line.duration, line.at
    until = ended + AFTER_SECONDS + (app.timeouts.request if line.status in LEFT else 0)
    since = began - BEFORE_SECONDS
    missing: list[str] = []
    events = [
        _event(began, "nginx", f"{line.method} {line.path} from {line.client}"),
        _event(ended, "nginx", f"answered {line.status}" + ("" if line.by_app else " in place of the app")),
        *_of_nginx_errors(line, began, ended),
    ]
    named = list(_of_app(app, request_id, since, until))
    by_app, pids = [event for event, _ in named], {pid for _, line_pids in named for pid in line_pids}
    if not by_app and line.upstream_status:
        by_app = list(_meanwhile(app, since, until))[-MOST_GUESSES:]
    if not named and line.by_app:
        missing.append(
            f"{app.name} logs no line with this id, which it gets as the header X-Request-ID: "
            + ("what it said meanwhile may be of other requests" if by_app else "it said nothing meanwhile")
        )
    events += by_app
    if app.database and (named or line.by_app):
        events += _of_database(app, pids, began, ended, until, missing)
    return Trace(request_id, app.name, line, sorted(events, key=lambda event: event.at), missing)


def _of_app(app: App, request_id: str, since: float, until: float) -> Iterator[tuple[Event, tuple[int, ...]]]:
    """What the app says with this id in it, in whatever form, and the database processes that it names with it."""
    for entry in journal.entries(journal.slot_units(app.name), since=since, until=until, grep=request_id):
        line = said.by_app(entry.message)
        yield _said(entry, line), line.database_pids


def _meanwhile(app: App, since: float, until: float) -> Iterator[Event]:
    for entry in journal.entries(journal.slot_units(app.name), since=since, until=until):
        # A line that names another request is of that.
        line = said.by_app(entry.message)
        if not line.request_id:
            event = _said(entry, line)
            event.surely = False
            yield event


def _said(entry: journal.Entry, line: said.Said) -> Event:
    more = {name: line.fields[name] for name in ("status", "duration_ms") if name in line.fields}
    words = " ".join([line.text, *(f"{name}={value}" for name, value in more.items())])
    return _event(entry.at, "app", words, level=line.level, pid=entry.pid, unit=entry.unit, detail=line.trace)


def _of_nginx_errors(line: Line, began: float, ended: float) -> Iterator[Event]:
    # Older lines know neither the connection nor the fraction of the second.
    since, until = began - NGINX_SECONDS, ended + NGINX_SECONDS
    if not line.connection:
        since, until = began - BEFORE_SECONDS, ended + BEFORE_SECONDS
    seen = set()
    for entry in journal.entries(["SYSLOG_IDENTIFIER=nginx"], since=since, until=until):
        found = said.CONNECTION.search(entry.message)
        # A connection carries many requests; the message quotes the one that it is about.
        if found is None or f' "{line.method} {line.path}' not in entry.message or found["text"] in seen:
            continue
        if line.connection in (0, int(found["connection"])):
            # Each attempt is a line.
            seen.add(found["text"])
            surely = line.connection != 0
            yield _event(entry.at, "nginx", found["text"], level="ERROR", pid=entry.pid, surely=surely)


def _of_database(
    app: App, pids: set[int], began: float, ended: float, until: float, missing: list[str]
) -> Iterator[Event]:
    if app.database is None or app.database.placement != "local":
        missing.append("the app's database is elsewhere, and so is its log")
        return
    found = []
    for entry in journal.entries([journal.DATABASE], since=began - BEFORE_SECONDS, until=until):
        statement = said.by_database(entry.message)
        # A statement is logged at its end. One that ended before the request began, or began later, is another's.
        if statement is None or statement.database != app.database.name:
            continue
        if entry.at < began or entry.at - statement.seconds > ended or (pids and entry.pid not in pids):
            continue
        text, _, detail = statement.text.partition("\n")
        level = statement.level
        found.append(_event(entry.at, "postgresql", text, level=level, pid=entry.pid, surely=bool(pids), detail=detail))
    if not pids:
        missing.append(f"{app.name} does not say which database processes it used (database_pids in its log)")
    if not found:
        missing.append("PostgreSQL logged nothing of it: it logs what fails, and what is slow")
    yield from found[-MOST_GUESSES:]


def _event(
    at: float,
    source: str,
    text: str,
    *,
    level: str = "",
    pid: int = 0,
    unit: str = "",
    surely: bool = True,
    detail: str = "",
) -> Event:
    return Event(stamp(at), source, text, level, pid, unit, surely, detail, at)
