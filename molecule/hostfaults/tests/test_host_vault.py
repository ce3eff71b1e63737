"""Vault is sealed while the app has to start: it waits, and starts by itself once it can have its secrets."""

from __future__ import annotations

import hvac
from forge_faults import FaultContext
from forge_runbook import Runbooks
from forge_scenario import until
from forge_vault import cursor, health, said, sealed, unseal_key
from testinfra.host import Host

PAGE, OVER = "vault-unreachable-or-sealed", "See that it is mended"


def test_sealed_during_a_restart(
    fault: FaultContext, host: Host, vault: hvac.Client, live: str, runbooks: Runbooks
) -> None:
    """Clients wait and get 502 or 504; nobody has to touch the host."""
    with fault("Vault sealed during a restart") as happening, sealed(vault):
        since = cursor(host)
        host.check_output("systemctl restart --no-block %s", live)
        until(lambda: said(host, since, live), 30)
        happening.told("F401")
        assert "forge-launch: inbox: Vault at" in runbooks.follow(PAGE, "After a reboot or a crash")
        happening.mended_by(PAGE)
        runbooks.follow(PAGE, "Unseal it", {"unseal-key": unseal_key()})
        until(lambda: health(vault) == 200, 20)
    assert happening.hurt
    runbooks.follow(PAGE, OVER)
