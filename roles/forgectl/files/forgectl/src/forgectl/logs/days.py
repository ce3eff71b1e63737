"""The last day of an app in steps of five minutes: requests, latencies, errors, memory, and what was released.

All of it is in logs that a host keeps anyway. At most READ_BYTES of Nginx's are read, the newest: `complete_from` says
from when on the figures are whole.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime

import msgspec

from forgectl import state, systemd
from forgectl.errors import ForgeError, Refused
from forgectl.layout import Layout
from forgectl.logs import access, memory
from forgectl.logs.access import Part
from forgectl.logs.latency import Latencies
from forgectl.logs.window import clock, stamp

STEP_SECONDS, STEPS = 300, 288
# Of all apps together: some seconds of one core.
READ_BYTES = 1024 * 1024 * 1024
CLASSES = ("2xx", "3xx", "4xx", "5xx")
# How long after an app's first release its first request may come and still be its first.
BORN_SECONDS = 600
BARS = " ▁▂▃▄▅▆▇█"
SHOWN_STEPS = 72


class Happened(msgspec.Struct):
    """An entry of the history of releases."""

    at: str
    action: str
    release: str
    outcome: str


class Day(msgspec.Struct):
    """An app's day. Each list has one entry a step; latencies in seconds are null without requests, memory in bytes
    without a measurement; `memory_limit` is 0 without one. `answers` are requests by class of status.
    """

    requests: list[int]
    answers: dict[str, list[int]]
    p50: list[float | None]
    p95: list[float | None]
    p99: list[float | None]
    memory: list[int | None]
    memory_limit: int
    happened: list[Happened]
    complete_from: str
    unreadable: int


class _Step:
    """What is counted in one step."""

    __slots__ = ("answers", "latencies", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.answers = dict.fromkeys(CLASSES, 0)
        self.latencies = Latencies()


class _Brief(msgspec.Struct):
    """What is read of a line of Nginx's log: the fewer fields, the quicker."""

    timestamp: str
    status: int = 0
    duration: float = 0.0
    at: float = 0.0
    stream: int = 0


_DECODER = msgspec.json.Decoder(_Brief)


def begin(now: float) -> int:
    """The Unix time at which the day begins whose last step is the present one."""
    return (int(now) // STEP_SECONDS - STEPS + 1) * STEP_SECONDS


def of(layout: Layout, now: float, budget: int = READ_BYTES) -> Day:
    """Read the last day of an app."""
    start = begin(now)
    steps = [_Step() for _ in range(STEPS)]
    complete, unreadable = _count(layout, start, steps, budget)
    history = _history(layout)
    if history and complete < datetime.fromisoformat(history[0].at).timestamp() + BORN_SECONDS:
        # Before its first release there was nothing to log.
        complete = start
    quantiles = [step.latencies.quantiles(0.5, 0.95, 0.99) for step in steps]
    p50, p95, p99 = ([each[rank] for each in quantiles] for rank in range(3))
    used, limit = _memory(layout, start, now)
    return Day(
        [step.requests for step in steps],
        {name: [step.answers[name] for step in steps] for name in CLASSES},
        p50,
        p95,
        p99,
        used,
        limit,
        list(_happened(history, start)),
        stamp(complete),
        unreadable,
    )


def document(apps: Sequence[Layout], now: float, budget: int = READ_BYTES) -> dict[str, object]:
    """The last day of some apps as one JSON-ready object; none of them can use up what the others may read."""
    share = budget // max(1, len(apps))
    return {
        "schema": 1,
        "at": stamp(now),
        "from": stamp(begin(now)),
        "step": STEP_SECONDS,
        "apps": {layout.name: of(layout, now, share) for layout in apps},
    }


def text(name: str, day: Day, start: float) -> Iterator[str]:
    """The same for a person, in steps of twenty minutes."""
    yield f"{name}  since {clock(start)[:5]} yesterday, a column for each 20 minutes"
    rates = _wider(day.requests, sum)
    errors = _wider([*day.answers["5xx"]], sum)
    slow = _wider([each or 0.0 for each in day.p99], max)
    used = _wider([each or 0 for each in day.memory], max)
    yield f"  requests/s  {_bars(rates)}  up to {max(rates) / (STEP_SECONDS * 4):.3g}"
    yield f"  p99         {_bars(slow)}  up to {max(slow):.3f} s"
    yield f"  5xx         {_bars(errors)}  {sum(day.answers['5xx'])} in all"
    limit = f" of {day.memory_limit >> 20} MiB" if day.memory_limit else ""
    yield f"  memory      {_bars(used)}  up to {int(max(used)) >> 20}{limit or ' MiB'}"
    for each in day.happened:
        yield f"  {each.at}  {each.action:<11}  {each.release or '-'}  {each.outcome}"
    if datetime.fromisoformat(day.complete_from).timestamp() > start:
        yield f"  requests before {day.complete_from} are not counted, or not in full"
    if day.unreadable:
        yield f"  {day.unreadable} lines of Nginx's log can't be read"


def _count(layout: Layout, start: int, steps: list[_Step], budget: int) -> tuple[float, int]:
    """Count the requests; returns from which Unix time on they are complete, and how many lines can't be read."""
    complete, unreadable, last = float(start), 0, ("", 0.0)
    every = access.parts(layout.access_log)
    # What rotation has deleted is not known either.
    if every and every[0].began == 0.0 and len(every) > 1:
        complete = max(complete, _first_time(every[0]))
    for part in reversed(every):
        if part.ended + access.SLACK_SECONDS < start:
            break
        length = access.length(part, start)
        if part.packed and length > budget:
            complete = max(complete, part.ended)
            break
        earliest = float("inf")
        for raw in access.read(part, start, None if part.packed else budget):
            try:
                line = _DECODER.decode(raw)
                # Of many lines in a row the second is the same.
                if line.timestamp != last[0]:
                    last = (line.timestamp, datetime.fromisoformat(line.timestamp).timestamp())
            except (msgspec.DecodeError, ValueError):
                unreadable += 1
                continue
            at = line.at or last[1]
            earliest = min(earliest, at)
            number = int(at - start) // STEP_SECONDS
            # A clock that was set may have been ahead.
            if at >= start and number < STEPS:
                _add(steps[number], line)
        budget -= length
        if budget < 0:
            complete = max(complete, earliest if earliest < float("inf") else part.ended)
            break
    return complete, unreadable


def _add(step: _Step, line: _Brief) -> None:
    step.requests += 1
    name = f"{line.status // 100}xx"
    # 101 is an upgrade that went well.
    step.answers[name if name in step.answers else "2xx"] += 1
    if not (line.stream or line.status == 101):
        step.latencies.add(line.duration)


def _first_time(part: Part) -> float:
    """When the oldest file begins; it is read no further."""
    for raw in access.read(part):
        if line := access.decode(raw):
            return line.at
    return part.ended


def _memory(layout: Layout, start: int, now: float) -> tuple[list[int | None], int]:
    """The most in each step, and the newest limit; the last step is measured now."""
    found: list[tuple[float, int, int]] = []
    # Whatever ails the journal, the rest of the day is known.
    with suppress(ForgeError):
        found = memory.since(layout, start)
    if slot := layout.live_slot():
        service = layout.service(slot)
        found.append((now, systemd.memory(service), systemd.memory_limit(service)))
    series: list[int | None] = [None] * STEPS
    for at, used, _ in found:
        number = int(at - start) // STEP_SECONDS
        if 0 <= number < STEPS:
            series[number] = max(used, series[number] or 0)
    return series, found[-1][2] if found else 0


def _history(layout: Layout) -> list[state.Entry]:
    # `forgectl status` says what is wrong with it.
    with suppress(Refused):
        return state.load(layout).history
    return []


def _happened(history: Sequence[state.Entry], start: int) -> Iterator[Happened]:
    for entry in history:
        if datetime.fromisoformat(entry.at).timestamp() >= start:
            yield Happened(entry.at, entry.action, entry.release, entry.outcome)


def _wider(values: Sequence[float], join: Callable[[Sequence[float]], float]) -> list[float]:
    size = STEPS // SHOWN_STEPS
    return [join(values[number : number + size]) for number in range(0, STEPS, size)]


def _bars(values: Sequence[float]) -> str:
    most = max(values) or 1
    # What is more than nothing shows.
    return "".join(BARS[math.ceil(value / most * (len(BARS) - 1))] for value in values)
