"""Load on a host, and what an event under load cost its clients."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forge_load import OK, Record, Result, Running, capacity, percentile, running

from bench.hosts import DOMAIN, BenchError, Host

MARGIN_SECONDS = 5.0
"""How long before and after an event its requests count as the event's."""
WARM_SECONDS = 2.0
STEADY_SECONDS = 10.0


@dataclass(frozen=True)
class Site:
    """A host under its name, with the CA that its clients trust."""

    host: Host
    cafile: Path
    rate: float = 0.0
    """Requests a second."""

    def capacity(self) -> float:
        """Measure the requests a second that the clients of the load get through in a closed loop."""
        try:
            return capacity(self.host.address, DOMAIN, self.cafile)
        except RuntimeError as error:
            raise BenchError(f"{self.host.name}: {error}. Do: run the bench with --keep and look there.") from error

    def at(self, rate: float) -> Site:
        """Choose the rate of the load."""
        return replace(self, rate=rate)

    def load(self) -> Running:
        """Put it under load for the length of a `with` block."""
        return running(self.host.address, DOMAIN, self.cafile, rate=self.rate, extras=False)


@dataclass
class Event:
    """Something that was done to a host under load; times in seconds since the epoch.

    `over`: when the app answered again, which a command that restarts in place does not wait for.
    """

    name: str
    began: float
    ended: float
    over: float
    details: dict[str, Any]


def during(
    name: str,
    work: Callable[[], dict[str, Any]],
    recover: Callable[[], None] = lambda: None,
    look: Callable[[], dict[str, Any]] = dict,
) -> Event:
    """Do something, wait until the app answers again, then so long that no request counts for two events.

    In between comes the `look` at what was done, which takes the CPU of the host and belongs to neither.
    """
    began = time.time()
    details = work()
    ended = time.time()
    recover()
    over = time.time()
    time.sleep(MARGIN_SECONDS)
    details |= look()
    time.sleep(MARGIN_SECONDS)
    return Event(name, began, ended, over, details)


def steady(result: Result) -> list[Record]:
    """Return the requests of the stretch before the first event."""
    return result.between(result.began + WARM_SECONDS, result.began + WARM_SECONDS + STEADY_SECONDS)


def window(event: Event, result: Result) -> list[Record]:
    """Return the requests that count as the event's."""
    return result.between(event.began - MARGIN_SECONDS, event.over + MARGIN_SECONDS)


def cost(event: Event, result: Result) -> dict[str, Any]:
    """Put in figures what an event cost; times in seconds, latencies in milliseconds."""
    records = window(event, result)
    failed = [record for record in records if record.outcome != OK]
    posts = sum(record.kind == "post" for record in failed)
    p99, quiet = percentile(records, 99), percentile(steady(result), 99)
    return {
        "event": event.name,
        "seconds": round(event.ended - event.began, 3),
        "requests": len(records),
        "lost_get": len(failed) - posts,
        "lost_post": posts,
        "failures": sorted({f"{record.outcome} {record.status}" for record in failed}),
        # From the first request that failed to the last one.
        "failing_seconds": round(max(r.due for r in failed) - min(r.due for r in failed), 3) if failed else 0.0,
        "p99_ms": round(p99 * 1000, 2),
        "steady_p99_ms": round(quiet * 1000, 2),
        "p99_ratio": round(p99 / quiet, 2),
        "to_swap": round(event.details.get("swapped", event.ended) - event.began, 3),
        **event.details,
    }


def prove_sight(site: Site) -> int:
    """Kill the proxy under load; the generator has to see it.

    Raises:
        BenchError: it saw nothing, so that no other figure would mean anything.
    """

    def kill() -> dict[str, Any]:
        site.host.root("systemctl kill --signal=KILL nginx; sleep 1; systemctl restart nginx")
        return {}

    with site.load() as load:
        time.sleep(WARM_SECONDS)
        during("control", kill)
    lost = len(load.result.failed)
    if not lost:
        raise BenchError(
            "Expected: requests that fail while Nginx is killed. Found: none, so the load generator sees nothing.\n"
            "Do: look at molecule/shared/testing/forge_load.py; nothing that this run measured counts."
        )
    return lost
