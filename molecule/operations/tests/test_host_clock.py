"""Nobody keeps the clock.

A container's clock is its machine's, which no test may touch: here timesyncd is let run in one, with a server that
never answers, and what is seen is that doctor misses it and the page brings it back.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from forge_faults import FaultContext
from forge_runbook import Runbooks
from forge_scenario import CONTAINER, podman
from testinfra.host import Host

PAGE, OVER = "clock", "See that it is mended"
UNIT = "systemd-timesyncd.service"
DROP_IN, SERVERS = f"/run/systemd/system/{UNIT}.d/test.conf", "/run/systemd/timesyncd.conf.d/99-test.conf"
# As on a VM, but for its servers: an address of documentation.
LIKE_A_VM = f"""
mkdir --parents {DROP_IN.rpartition("/")[0]} {SERVERS.rpartition("/")[0]}
printf '[Unit]\\nConditionVirtualization=\\n' > {DROP_IN}
printf '[Time]\\nNTP=\\nNTP=192.0.2.1\\nFallbackNTP=\\n' > {SERVERS}
systemctl daemon-reload
systemctl restart {UNIT}
"""
AS_BEFORE = f"""
rm --force {DROP_IN} {SERVERS}
systemctl daemon-reload
systemctl unmask {UNIT}
systemctl enable {UNIT}
systemctl stop {UNIT}
systemctl start {UNIT}
"""


@pytest.fixture
def container() -> Iterator[None]:
    """Have the clock be the machine's again in the end, whatever happens."""
    yield
    podman("exec", CONTAINER, "sh", "-euc", AS_BEFORE)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("container")
def test_nobody_keeps_the_clock(fault: FaultContext, host: Host, runbooks: Runbooks) -> None:
    """Somebody stopped it for good: clients notice nothing."""
    with fault("clock not synchronised") as happening:
        # Whether the machine's clock is synchronised is no matter, so it becomes the host's own in here.
        podman("exec", CONTAINER, "sh", "-euc", LIKE_A_VM)
        assert host.check_output("systemctl is-active %s", UNIT) == "active"
        host.check_output("systemctl disable --now %s && systemctl mask %s", UNIT, UNIT)
        happening.told("F607")
        runbooks.follow(PAGE, "What you see")
        assert "timesyncd does not run" in runbooks.follow(PAGE, "Look")
        happening.mended_by(PAGE)
        runbooks.follow(PAGE, "Start it")
        assert host.check_output("systemctl is-active %s", UNIT) == "active"
        assert host.check_output("systemctl is-enabled %s", UNIT) == "enabled"
        podman("exec", CONTAINER, "sh", "-euc", AS_BEFORE)
    assert happening.hurt == []
    runbooks.follow(PAGE, OVER)
