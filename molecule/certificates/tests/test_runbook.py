"""docs/runbooks/certificate-expiring.md: every command works, in the situation that it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from forge_acme import DOMAIN, OpenBao, openbao, own, own_ca, provision, served, watch
from forge_places import control, runbooks
from forge_runbook import Runbooks
from testinfra.host import Host

__all__ = ["control", "openbao", "own", "own_ca", "runbooks"]

PAGE = "certificate-expiring"
OVER = "See that it is mended"

Inventory = Callable[[dict[str, Any]], None]


@pytest.fixture
def inventory(control: Path) -> Iterator[Inventory]:
    """Write variables into the inventory of the control machine, and take them out again."""
    file = control / "inventory" / "production" / "host_vars" / "vm.yml"
    file.parent.mkdir(exist_ok=True)
    before = file.read_text() if file.exists() else "{}"

    def write(variables: dict[str, Any]) -> None:
        file.write_text(yaml.safe_dump((yaml.safe_load(before) or {}) | variables))

    yield write
    file.write_text(before)


def test_acme_server_refuses(host: Host, openbao: OpenBao, runbooks: Runbooks) -> None:
    """A renewal fails: the alert, its reason, and the renewal that succeeds."""
    assert provision(**openbao.variables).returncode == 0
    with openbao.aged():
        host.check_output("forge-certificates reissue inbox")
    before = served(host)
    host.check_output("cp /etc/hosts /run/hosts && echo 127.0.0.1 %s >> /etc/hosts", DOMAIN)
    with openbao.refusing():
        assert len(watch(host)) == 1
        assert "no new one is in service: expected: https://" in runbooks.follow(PAGE, "What you see")
        runbooks.follow(PAGE, "Look")
        runbooks.follow(PAGE, "From an ACME server")
        runbooks.follow(PAGE, "The reason names a domain")
        runbooks.follow(PAGE, "The reason names the server")
        assert served(host) == before
    host.check_output("cat /run/hosts > /etc/hosts")
    runbooks.follow(PAGE, "When the reason is gone")
    assert served(host) != before
    runbooks.follow(PAGE, "Nginx does not reload")
    runbooks.follow(PAGE, OVER)


def test_acme_key_is_known(host: Host, openbao: OpenBao, runbooks: Runbooks) -> None:
    """A new key serves, and the old certificate is revoked."""
    before = served(host)
    runbooks.follow(PAGE, "A key from an ACME server")
    assert served(host).public_key() != before.public_key()
    assert openbao.has_revoked(before)


@pytest.mark.exhaustive
def test_own_files_run_out(
    host: Host, runbooks: Runbooks, inventory: Inventory, own: Callable[..., dict[str, Any]]
) -> None:
    """The files are replaced where they are."""
    assert provision(**own(days=12)).returncode == 0
    assert len(watch(host)) == 1
    assert "nginx_tls_certificates" in runbooks.follow(PAGE, "What you see")
    runbooks.follow(PAGE, "Look")
    inventory(own(days=299))
    runbooks.follow(PAGE, "From files of your own")
    assert served(host).subject.rfc4514_string() == "CN=own for 299 days"
    runbooks.follow(PAGE, OVER)


@pytest.mark.exhaustive
def test_own_ca(host: Host, openbao: OpenBao, runbooks: Runbooks, inventory: Inventory, own_ca: dict[str, Any]) -> None:
    """It signs what it is asked for; and a key that is gone is made anew."""
    inventory(own_ca)
    runbooks.follow(PAGE, "From a CA of your own")
    before = served(host)
    assert before.issuer.rfc4514_string() == "CN=ours"
    runbooks.follow(PAGE, "A key of a CA of your own")
    assert served(host).public_key() != before.public_key()
    assert provision(**openbao.variables).returncode == 0


@pytest.mark.exhaustive
def test_every_command_was_run(runbooks: Runbooks) -> None:
    """The page has no command that no test of this module has seen work."""
    assert runbooks.left(PAGE) == []
