"""What one app that misbehaves costs the others: latency as a ratio within one run, and lines of the journal."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import forge_load
import httpx
import pytest
from forge_load import percentile
from forge_scenario import Status, main_pid, until
from testinfra.host import Host

RATE = 60.0
QUIET_SECONDS, HARM_SECONDS = 7.0, 9.0
WITHIN = 2.0
"""How much longer than without a noisy neighbour the slowest of a hundred requests may take."""
FLOOR_MS = 10.0
"""Where latencies are so short that the clock of a shared machine decides, they count as this."""


def rogue_unit(host: Host) -> str:
    slot = host.check_output("basename $(readlink /run/rogue/live.sock) .sock")
    return f"rogue@{slot}.service"


@pytest.fixture
def measured(
    site: tuple[str, str, Path], rogue: httpx.Client, say: Callable[[str], None]
) -> Callable[[str], forge_load.Result]:
    """Load on one app, first quietly, then while the other does harm: nothing fails, and latency has its bound."""

    def around(harm: str) -> forge_load.Result:
        with forge_load.running(*site, rate=RATE, clients=8, extras=False) as load:
            time.sleep(2)
            began = time.time()
            time.sleep(QUIET_SECONDS)
            struck = time.time()
            rogue.post(f"/{harm}", content=str(HARM_SECONDS))
            time.sleep(HARM_SECONDS)
            ended = time.time()
        result = load.result
        quiet, noisy = (
            percentile(result.between(*span), 99) * 1000 for span in ((began, struck - 0.5), (struck + 0.5, ended))
        )
        say(f"{harm}: p99 {quiet:.1f} ms quiet, {noisy:.1f} ms with a noisy neighbour")
        assert result.counts() == {}
        assert noisy <= WITHIN * max(quiet, FLOOR_MS)
        return result

    return around


def test_spinning_on_all_cores(measured: Callable[[str], forge_load.Result]) -> None:
    """More busy processes than there are cores."""
    measured("spin")


def test_leaking_memory(
    host: Host, measured: Callable[[str], forge_load.Result], rogue: httpx.Client, status: Status
) -> None:
    """The kernel ends the worker that leaks, and nothing of the other app; a new worker takes its place."""
    unit = f"inbox@{status()['live']['slot']}.service"
    workers = host.check_output("pgrep --parent %s", str(main_pid(host, unit)))
    since = host.check_output("date +%s")
    measured("leak")
    assert host.check_output("pgrep --parent %s", str(main_pid(host, unit))) == workers
    until(lambda: rogue.get("/ready").status_code == 200, 30)
    said = host.check_output("journalctl --no-pager --output=cat --since=@%s --unit=%s", since, rogue_unit(host))
    assert "SIGKILL" in said or "oom" in said.lower(), said


def test_flooding_the_log(host: Host, measured: Callable[[str], forge_load.Result], status: Status) -> None:
    """It loses lines of its own, and none of the other app's."""
    since = host.check_output("date +%s")
    unit = f"inbox@{status()['live']['slot']}.service"
    result = measured("flood")
    # What is on its way to the disk.
    time.sleep(2)
    said = host.check_output("journalctl --no-pager --output=cat --since=@%s --unit=%s", since, unit)
    logged = sum("path" in json.loads(line) for line in said.splitlines() if line.startswith("{"))
    assert logged >= len(result.records)
    dropped = host.check_output("journalctl --no-pager --output=cat --since=@%s _COMM=systemd-journal", since)
    suppressed = re.findall(r"Suppressed (\d+) messages from (\S+)", dropped)
    assert {name for _, name in suppressed} <= {rogue_unit(host)}
