"""The journal is flooded: it stays within its budget, keeps what others write, and nobody waits for it."""

from __future__ import annotations

import pytest
from forge_faults import FaultContext
from forge_runbook import Runbooks
from forge_vault import cursor, journal
from testinfra.host import Host

PAGE, OVER = "journal-flooded", "See that it is mended"
UNIT = "chatter.service"
# A program that says the same all the time; with half a core, which leaves the rest to clients.
CHATTER = "systemd-run --quiet --unit=%s --property=CPUQuota=50%% yes nothing happened"


@pytest.mark.exhaustive
def test_flooded(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """Clients notice nothing, each of their requests is in the journal, and the flood is not."""
    since = cursor(host)
    with fault("journal flooded") as happening:
        host.check_output(CHATTER, UNIT)
        try:
            happening.told("F603", within=120)
            runbooks.follow(PAGE, "What you see")
            runbooks.follow(PAGE, "Look", {"unit": UNIT})
            happening.mended_by(PAGE)
            runbooks.follow(PAGE, "Stop it", {"unit": UNIT})
        finally:
            host.run("systemctl stop %s; systemctl reset-failed %s", UNIT, UNIT)
        runbooks.follow(PAGE, "Give the room back")
    assert happening.hurt == []
    runbooks.follow(PAGE, OVER)
    dropped = journal(host, since, "--unit=systemd-journald.service", "--grep=^Suppressed")
    assert {line.split()[-1] for line in dropped} == {UNIT}
    posted = journal(host, since, "--identifier=inbox", "--grep=POST")
    assert len(posted) >= len(happening.result.acknowledged)
