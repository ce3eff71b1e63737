"""Vault is sealed while the app has to start: it waits, and starts by itself once it can have its secrets."""

from __future__ import annotations

import hvac
import pytest
from forge_faults import FaultContext
from forge_runbook import Runbooks
from forge_scenario import until
from forge_vault import cursor, destroy_secret_ids, health, said, sealed, unseal_key
from testinfra.host import Host

VAULT, REJECTED = "vault-unreachable-or-sealed", "secret-id-expired"
OVER = "See that it is mended"


def test_sealed_during_a_restart(
    fault: FaultContext, host: Host, vault: hvac.Client, live: str, runbooks: Runbooks
) -> None:
    """Clients wait, and get 502 or 504 where that takes too long; nobody has to touch the host."""
    with fault("Vault sealed during a restart") as happening, sealed(vault):
        since = cursor(host)
        host.check_output("systemctl restart --no-block %s", live)
        until(lambda: said(host, since, live), 90)
        happening.told("F401")
        assert "forge-launch: inbox: Vault at" in runbooks.follow(VAULT, "After a reboot or a crash")
        happening.mended_by(VAULT)
        runbooks.follow(VAULT, "Unseal it", {"unseal-key": unseal_key()})
        until(lambda: health(vault) == 200, 60)
    assert max(record.latency for record in happening.inside) > happening.mending - happening.began - 1
    runbooks.follow(VAULT, OVER)


@pytest.mark.exhaustive
def test_secret_ids_rejected(fault: FaultContext, vault: hvac.Client, runbooks: Runbooks) -> None:
    """Somebody destroyed them: clients notice nothing, and nothing can start until the host has others."""
    with fault("secret ids rejected") as happening:
        for identity in ("app", "migrate", "rotate"):
            destroy_secret_ids(vault, f"forge-inbox-{identity}")
        happening.told("F402")
        happening.mended_by(REJECTED)
        runbooks.follow(REJECTED, "With the control machine")
    assert happening.hurt == []
    runbooks.follow(REJECTED, OVER)
