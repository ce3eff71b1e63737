"""The slowest requests and the errors since a time, of some apps, counted in groups of which there are not too many."""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import msgspec

from forgectl.config import App
from forgectl.layout import Layout
from forgectl.logs import access, journal, said
from forgectl.logs.access import Line
from forgectl.logs.latency import Latencies
from forgectl.logs.window import clock, stamp

SERVER_ERROR = 500
# Somebody who looks for holes makes up paths without end.
MOST_GROUPS = 500
# Of the journal, the newest lines that may be errors.
MOST_ENTRIES = 50_000


class Group(msgspec.Struct, omit_defaults=True):
    """Errors that are one: how often, when first and last, and a request id to follow, if one is known."""

    what: str
    count: int
    first: str
    last: str
    request_id: str = ""
    source: str = ""
    last_at: float = 0.0


class Summary(msgspec.Struct):
    """An app since a time. Latencies are in seconds and leave out streams; null where there was no request."""

    requests: int
    statuses: dict[str, int]
    p50: float | None
    p95: float | None
    p99: float | None
    slowest: list[Line]
    errors: list[Group]
    unreadable: int


class _Tally:
    """Counts by group, a bounded number of them; the rest is counted as one."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._found: dict[str, list[float]] = {}
        self._ids: dict[str, str] = {}

    def add(self, what: str, at: float, request_id: str = "") -> None:
        if what not in self._found and len(self._found) >= MOST_GROUPS:
            what = "others"
        seen = self._found.setdefault(what, [0, at, at])
        seen[0] += 1
        seen[1] = min(seen[1], at)
        # The newest one is the likeliest to be in all logs still.
        if request_id and at >= seen[2]:
            self._ids[what] = request_id
        seen[2] = max(seen[2], at)

    def groups(self) -> Iterator[Group]:
        for what, (count, first, last) in self._found.items():
            yield Group(what, int(count), stamp(first), stamp(last), self._ids.get(what, ""), self._source, last)


def of(layout: Layout, app: App, since: float, count: int) -> Summary:
    """Sum up the requests of an app, and what it and its database said."""
    statuses: Counter[int] = Counter()
    latencies, answers = Latencies(), _Tally("nginx")
    slowest: list[tuple[float, int, Line]] = []
    unreadable = 0

    def skipped() -> None:
        nonlocal unreadable
        unreadable += 1

    for number, line in enumerate(access.lines(layout.access_log, since, skipped)):
        statuses[line.status] += 1
        if line.status >= SERVER_ERROR:
            by = "" if line.by_app else " by Nginx"
            answers.add(f"{line.status}{by} {line.method} {said.route(line.path)}", line.at, line.request_id)
        if line.is_stream:
            continue
        latencies.add(line.duration)
        if len(slowest) < count:
            heapq.heappush(slowest, (line.duration, number, line))
        elif line.duration > slowest[0][0]:
            heapq.heapreplace(slowest, (line.duration, number, line))
    groups = [*answers.groups(), *_of_app(app, since), *_of_database(app, since)]
    p50, p95, p99 = latencies.quantiles(0.5, 0.95, 0.99)
    return Summary(
        statuses.total(),
        {str(status): number for status, number in sorted(statuses.items())},
        p50,
        p95,
        p99,
        [line for _, _, line in sorted(slowest, key=lambda each: each[:2], reverse=True)],
        sorted(groups, key=lambda group: (-group.count, group.what))[:count],
        unreadable,
    )


def alerts(names: Sequence[str], since: float, count: int) -> list[Group]:
    """The alerts of these apps and of the host, newest last."""
    tally = _Tally("alert")
    for entry in journal.entries(["--priority=err"], since=since, grep="^ALERT "):
        # Whoever may write to the journal can begin a line like this.
        subject = entry.message.removeprefix("ALERT ").partition(":")[0].strip()
        if subject in (*names, "host"):
            tally.add(entry.message, entry.at)
    return sorted(tally.groups(), key=lambda group: group.last_at)[-count:]


def text(name: str, found: Summary, *, slowest: bool, errors: bool) -> Iterator[str]:
    """The same for a person."""
    counts = ", ".join(f"{number} x {status}" for status, number in found.statuses.items())
    quick = ", ".join(
        f"{label} {seconds:.3f} s"
        for label, seconds in (("p50", found.p50), ("p95", found.p95), ("p99", found.p99))
        if seconds is not None
    )
    yield f"{name}: {found.requests} requests" + (f" ({counts}); {quick}" if found.requests else "")
    if found.unreadable:
        yield f"  {found.unreadable} lines of Nginx's log can't be read"
    if slowest:
        yield "  slowest requests" if found.slowest else "  slowest requests: none"
        for line in found.slowest:
            what = f"{line.status} {line.method} {line.path}"
            yield f"    {line.duration:8.3f} s  {clock(line.at)}  {what}  {line.request_id}"
    if errors:
        yield "  errors" if found.errors else "  errors: none"
        for group in found.errors:
            follow = f"  {group.request_id}" if group.request_id else ""
            yield f"    {group.count:6} x  last {clock(group.last_at)}  {group.source:<10}  {group.what}{follow}"


def _of_app(app: App, since: float) -> Iterator[Group]:
    tally = _Tally("app")
    # Newest first, so that what is left out of too many is the oldest.
    possible = journal.entries(journal.app_units(app.name), since=since, grep=said.MAYBE_ERROR, newest_first=True)
    for entry in islice(possible, MOST_ENTRIES):
        line = said.by_app(entry.message)
        if line.is_error:
            tally.add(said.alike(line.reason), entry.at, line.request_id)
    yield from tally.groups()


def _of_database(app: App, since: float) -> Iterator[Group]:
    if app.database is None or app.database.placement != "local":
        return
    tally = _Tally("postgresql")
    possible = journal.entries([journal.DATABASE], since=since, grep="ERROR|FATAL|PANIC", newest_first=True)
    for entry in islice(possible, MOST_ENTRIES):
        statement = said.by_database(entry.message)
        if statement and statement.is_error and statement.database in (app.database.name, ""):
            tally.add(said.alike(f"{statement.level}: {statement.text}"), entry.at)
    yield from tally.groups()
