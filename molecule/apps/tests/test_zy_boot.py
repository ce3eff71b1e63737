"""A boot brings back what ran."""

from __future__ import annotations

import pytest
from forge_apps import beats, entries, live_unit, settled, state, trail
from forge_scenario import CONTAINER, podman, reachable, show, until
from testinfra.host import Host


@pytest.mark.exhaustive
def test_a_boot_brings_all_back(host: Host) -> None:
    """Every app with the release that was live, what ran beside it, and what is on a schedule with its timer."""
    before = {app: settled(host, app)["live"] for app in entries(host) if state(host, app)["live"]}
    began = len(trail(host, "tick"))
    podman("restart", "--time", "30", CONTAINER)
    assert until(lambda: reachable(host), 90, every=1)
    until(lambda: beats(host), 120, every=1)
    assert {app: settled(host, app)["live"] for app in before} == before
    assert set(beats(host)) == {f"plain.beat@{before['plain']['slot']}.service"}
    until(lambda: len(trail(host, "tick")) > began, 30, every=1)
    unit = live_unit(host, "inbox").replace("@", ".keyed@")
    until(lambda: show(host, unit, "ActiveState") == "active", 60, every=1)
