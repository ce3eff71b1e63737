"""Enough of it: what the events add up to. Last, because it counts all the others."""

from __future__ import annotations

import time
from collections.abc import Callable

from forge_events import EventContext, Ledger, answer, forgectl
from forge_load import percentile
from testinfra.host import Host

REQUESTS = 20_000
LIMIT_SECONDS = 600.0


def test_enough_requests_fell_inside_the_events(
    event: EventContext, host: Host, ledger: Ledger, say: Callable[[str], None]
) -> None:
    """Twenty thousand inside events that nobody may notice; recycling goes on until it is so many."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while inside(ledger) < REQUESTS:
        assert time.monotonic() < deadline, f"{inside(ledger)} requests after {LIMIT_SECONDS:.0f} s"
        with event("recycled once more"):
            answer(forgectl(host, "recycle", "inbox", "--json"))
    records = [record for each in ledger.strict for record in each.inside]
    say(f"{len(ledger.strict)} events, {len(records)} requests inside, p99 {percentile(records, 99) * 1000:.1f} ms")


def inside(ledger: Ledger) -> int:
    """Requests that fell inside the events."""
    return sum(len(each.inside) for each in ledger.strict)
