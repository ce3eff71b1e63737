"""A certificate ends while its server refuses another: every client refuses it, until somebody has it renewed."""

from __future__ import annotations

import pytest
from forge_acme import OpenBao, openbao, provision, watch
from forge_faults import FaultContext
from forge_runbook import Runbooks
from forge_scenario import until
from testinfra.host import Host

__all__ = ["openbao"]

PAGE, OVER = "certificate-expiring", "See that it is mended"
LIFETIME = 40


@pytest.mark.exhaustive
def test_expired_while_renewal_fails(fault: FaultContext, host: Host, openbao: OpenBao, runbooks: Runbooks) -> None:
    """The alert and doctor say both; the command of the page asks once more, and clients are served again."""
    assert provision(**openbao.variables).returncode == 0
    with fault("renewal fails until the certificate has expired") as happening:
        with openbao.brief(LIFETIME):
            host.check_output("forge-certificates reissue inbox")
        with openbao.refusing():
            # Clients on connections of before notice nothing; those that connect do.
            until(lambda: happening.hurt, 2 * LIFETIME, every=0.5)
            (alert,) = watch(host)
            assert "ended on" in alert
            happening.told("F102", "F103")
            runbooks.follow(PAGE, "What you see")
            runbooks.follow(PAGE, "From an ACME server")
        happening.mended_by(PAGE)
        runbooks.follow(PAGE, "When the reason is gone")
    assert {record.outcome for record in happening.hurt} == {"tls"}
    runbooks.follow(PAGE, OVER)
