"""What holds on every host, whatever a scenario did to it."""

from __future__ import annotations

from testinfra.host import Host


def test_host_is_well(host: Host) -> None:
    """No unit has failed; one that has shows its journal."""
    assert host.run("systemctl is-system-running").stdout.strip() == "running"
