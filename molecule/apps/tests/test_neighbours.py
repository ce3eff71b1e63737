"""What one app that misbehaves costs the others: latency as a ratio within one run, and lines of the journal."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import forge_load
import httpx
import pytest
from forge_apps import live_unit
from forge_load import percentile
from forge_scenario import Status, main_pid, until
from testinfra.host import Host

RATE = 60.0
QUIET_SECONDS, HARM_SECONDS, SETTLE_SECONDS = 5.0, 5.0, 1.0
TURNS = 3
WITHIN = 2.0
"""How much longer than without a noisy neighbour the slowest of a hundred requests may take."""
FLOOR_MS = 10.0
"""Where latencies are so short that the clock of a shared machine decides, they count as this."""


@pytest.fixture
def harmed(site: tuple[str, str, Path], rogue: httpx.Client) -> Callable[[str, int], tuple[forge_load.Result, float]]:
    """Load on one app, by turns quietly and while the other does harm: nothing fails. The ratio of both p99."""

    def around(harm: str, turns: int) -> tuple[forge_load.Result, float]:
        seconds = QUIET_SECONDS if turns > 1 else SETTLE_SECONDS
        quiet, noisy = [], []
        with forge_load.running(*site, rate=RATE, clients=8, extras=False) as load:
            time.sleep(SETTLE_SECONDS)
            for _ in range(turns):
                began = time.time()
                time.sleep(seconds)
                quiet.append((began, time.time()))
                rogue.post(f"/{harm}", content=str(HARM_SECONDS))
                began = time.time()
                time.sleep(HARM_SECONDS)
                noisy.append((began, time.time()))
                time.sleep(SETTLE_SECONDS)
        result = load.result
        assert result.counts() == {}
        # Of several turns the one in the middle, since a shared machine has noise of its own.
        before, after = (
            statistics.median(percentile(result.between(*span), 99) * 1000 for span in spans)
            for spans in (quiet, noisy)
        )
        return result, after / max(before, FLOOR_MS)

    return around


@pytest.mark.exhaustive
@pytest.mark.parametrize("harm", ["spin", "leak", "flood"])
def test_latency_beside_a_noisy_neighbour(
    harmed: Callable[[str, int], tuple[forge_load.Result, float]], say: Callable[[str], None], harm: str
) -> None:
    """Busy processes on every core, memory without end, lines as fast as they are taken."""
    _, ratio = harmed(harm, TURNS)
    say(f"p99 beside a neighbour that does {harm}: {ratio:.2f} times the quiet one")
    assert ratio <= WITHIN


def test_a_leak_costs_the_leaking_worker(
    host: Host,
    harmed: Callable[[str, int], tuple[forge_load.Result, float]],
    rogue: httpx.Client,
    status: Status,
) -> None:
    """The kernel ends it, and nothing of the other app; a new worker takes its place."""
    unit = f"inbox@{status()['live']['slot']}.service"
    workers = host.check_output("pgrep --parent %s", str(main_pid(host, unit)))
    since = host.check_output("date +%s")
    harmed("leak", 1)
    assert host.check_output("pgrep --parent %s", str(main_pid(host, unit))) == workers
    until(lambda: rogue.get("/ready").status_code == 200, 30)
    said = host.check_output(
        "journalctl --no-pager --output=cat --since=@%s --unit=%s", since, live_unit(host, "rogue")
    )
    assert "SIGKILL" in said or "oom" in said.lower(), said


def test_a_flood_costs_no_line_of_another_app(
    host: Host, harmed: Callable[[str, int], tuple[forge_load.Result, float]], status: Status
) -> None:
    """Only those of the one that floods."""
    since = host.check_output("date +%s")
    unit = f"inbox@{status()['live']['slot']}.service"
    result, _ = harmed("flood", 1)

    def logged() -> bool:
        said = host.check_output("journalctl --no-pager --output=cat --since=@%s --unit=%s", since, unit)
        lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        return sum("path" in line for line in lines) >= len(result.records)

    until(logged, 20, every=1)
    dropped = host.check_output("journalctl --no-pager --output=cat --since=@%s _COMM=systemd-journal", since)
    suppressed = re.findall(r"Suppressed (\d+) messages from (\S+)", dropped)
    assert {name for _, name in suppressed} <= {live_unit(host, "rogue")}
