"""The journal is flooded: it stays within its budget, keeps what others write, and nobody waits for it."""

from __future__ import annotations

from forge_faults import FaultContext
from forge_runbook import Runbooks
from forge_scenario import until
from forge_vault import cursor, journal
from testinfra.host import Host

PAGE, OVER = "journal-flooded", "See that it is mended"
UNIT = "chatter.service"
# As a program that says the same all the time; with half a core, which leaves the rest to clients.
CHATTER = "while :; do seq --format='nothing happened %%.0f' 50000; done"


def test_flooded(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """Clients notice nothing, each of their requests is in the journal, and the flood is not."""
    since = cursor(host)
    with fault("journal flooded") as happening:
        host.check_output("systemd-run --quiet --unit=%s --property=CPUQuota=50%% sh -c %s", UNIT, CHATTER)
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
    until(lambda: "Suppressed" not in runbooks.follow(PAGE, OVER), 60, every=5)
    dropped = journal(host, since, "--unit=systemd-journald.service", "--grep=^Suppressed")
    assert {line.split()[-1] for line in dropped} == {UNIT}
    posted = journal(host, since, "--identifier=inbox", "--grep=POST")
    assert len(posted) >= len(happening.result.acknowledged)
