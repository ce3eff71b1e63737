"""Over a reboot: what was said before it, and while it went down, is told after it, once."""

from __future__ import annotations

import uuid

import httpx
import pytest
from forge_receivers import Receivers, alert, state
from forge_scenario import reachable, reboot, until
from testinfra.host import Host


@pytest.mark.exhaustive
def test_nothing_is_lost_over_a_reboot(host: Host, receivers: Receivers, client: httpx.Client) -> None:
    """Its receiver was away, so it had to be told later; the receivers themselves begin anew."""
    text = f"just before the reboot {uuid.uuid4().hex[:12]}"
    receivers.answer(500)
    alert(host, text)
    until(lambda: state(host, "webhook")["failing"], 60, every=1)
    reboot(client, patience=20)
    until(lambda: reachable(host), 60)
    host.check_output("mkdir --parents --mode=0700 /run/receivers")
    fresh = Receivers(host)
    fresh.answer(204)
    until(lambda: text in fresh.texts(), 120, every=1)
    host.check_output("systemctl restart forge-alerts.service")
    after = f"after the reboot {uuid.uuid4().hex[:12]}"
    alert(host, after)
    until(lambda: after in fresh.texts(), 120, every=1)
    assert [fresh.texts().count(each) for each in (text, after)] == [1, 1]
