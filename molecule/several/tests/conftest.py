"""What the tests of this scenario share."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from forge_events import event, ledger, rate, say, site, source
from forge_scenario import ToHost
from testinfra.host import Host

__all__ = ["event", "ledger", "rate", "say", "site", "source"]


@pytest.fixture
def client_of(host: Host) -> Iterator[Callable[[str], httpx.Client]]:
    """Make a client of a domain of the host, through Nginx and TLS."""
    trust = ssl.create_default_context(cafile=Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"]) / "tls" / "ca.pem")
    address = host.ansible.get_variables()["ansible_host"]
    with ExitStack() as stack:
        yield lambda domain: stack.enter_context(
            httpx.Client(base_url=f"https://{domain}", transport=ToHost(address, verify=trust), timeout=60)
        )


@pytest.fixture
def rogue(client_of: Callable[[str], httpx.Client]) -> httpx.Client:
    """A client of the app that does what it is told to."""
    return client_of("rogue.example.com")
